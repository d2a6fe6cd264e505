"""Every random draw comes from a seed derived by hashing what it is for, so no generator state is ever stored."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine: `derive(seed, "epoch", 3)`."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator for `derive(*parts)`. Draw on the CPU and move, so that every device sees one sequence."""
    import torch

    return torch.Generator().manual_seed(derive(*parts))
