"""The images an evaluation attacks, in the one order that every attack and model shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from casemate.data.splits import shuffled

if TYPE_CHECKING:
    from torch import Tensor

    from casemate.data.base import Images


def evaluation_order(n: int) -> list[int]:
    """A fixed random order of n images: its front is the subset that every attack and model shares, so that a
    longer evaluation takes over the whole chunks of a shorter one; what follows the last whole chunk is attacked
    again, as part of a longer one. The first k are `data.splits.evaluation_subset(n, k)`."""
    return [int(index) for index in shuffled(n, 0, "evaluation subset")]


@dataclass(frozen=True)
class EvaluationSet:
    """Images by index. They go to the device one chunk at a time."""

    images: Images
    device: str = "cpu"
    _prints: dict[bytes, str] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def dimensions(self) -> int:
        """Numbers per image, C x H x W."""
        return int(np.prod(self.images.images.shape[1:]))

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(x, y): float32 images N x C x H x W in [0, 1] and long labels (N,), on the device."""
        import torch

        at = np.asarray(indices, dtype=np.int64)
        pixels = np.ascontiguousarray(self.images.images[at].transpose(0, 3, 1, 2))
        x = torch.from_numpy(pixels).to(self.device).float().div_(255)
        return x, torch.from_numpy(np.ascontiguousarray(self.images.labels[at])).long().to(self.device)

    def fingerprint(self, indices: Sequence[int]) -> str:
        """A hash of which images these are: indices, pixels and labels."""
        at = np.asarray(indices, dtype=np.int64)
        known = self._prints.get(at.tobytes())
        if known is None:
            content = hashlib.sha256(at.tobytes())
            content.update(np.ascontiguousarray(self.images.images[at]).tobytes())
            content.update(np.ascontiguousarray(self.images.labels[at]).astype(np.int64).tobytes())
            known = self._prints[at.tobytes()] = content.hexdigest()[:32]
        return known
