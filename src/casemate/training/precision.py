"""bf16 where the hardware has it and the network is large enough to gain; evaluation is always float32."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from casemate.errors import UserError
from casemate.trainable import Precision

Chosen = Literal["fp32", "bf16"]

PAYS_ON_CPU = 200_000
"""Parameters from which bf16 gains on a CPU: 1.7 times at 309 k, nothing worth a rounding at LeNet-5's 62 k. A size
and not a timing decides, so that the same run is always made in the same precision."""


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively: AVX512-BF16 or AMX on a CPU, compute capability 8.0 on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, flag, bool)()) for flag in flags)
    return False


def choose(wanted: Precision, device: torch.device, modules: Iterable[nn.Module]) -> Chosen:
    """What `wanted` means on this device for these modules.

    Raises UserError if bf16 is asked for on a GPU that lacks it; a CPU without it is slow and still right.
    """
    if wanted == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(f"precision bf16 needs a GPU of compute capability 8.0; {device} has less: use auto or fp32")
    if wanted != "auto":
        return wanted
    if not has_bf16(device):
        return "fp32"
    size = sum(p.numel() for module in modules for p in module.parameters())
    return "bf16" if device.type != "cpu" or size >= PAYS_ON_CPU else "fp32"


def autocast(precision: Chosen, device: torch.device) -> AbstractContextManager[object]:
    """A context that computes in that precision; float32 is enforced, whatever is open around it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """True float32 for what is reported: no autocast and, on CUDA, no TF32. Put back as it was on leaving."""
    backends: tuple[Any, ...] = ()
    if device.type == "cuda":
        backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with autocast("fp32", device):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
