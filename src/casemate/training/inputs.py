"""What the loop reads: batches that can be had from any point on, and single images for methods that draw more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from casemate.errors import UserError


class TrainingData(Protocol):
    """Images of a split, resident where they are used; `casemate.data.device.DeviceData` is one."""

    labels: Tensor

    def __len__(self) -> int: ...

    def x(self, indices: Tensor, /) -> Tensor:
        """The images of those indices, float32 in [0, 1], N x C x H x W."""
        ...

    def augmented(self, indices: Tensor, rng: torch.Generator, /, *, pad: int, flip: bool) -> Tensor:
        """The same, each cropped out of a border of `pad` zeros and mirrored at random, drawn from `rng`."""
        ...

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, pad: int, flip: bool, drop_last: bool, start: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, indices) of one epoch from batch `start` on; the same for the same (seed, epoch)."""
        ...


class Draw:
    """Further training images for a step: `Context.draw`. What it draws depends on the step's generator alone.

    They are augmented as batches are; inside `plain`, where a method measures something, they are not.
    """

    def __init__(self, data: TrainingData, rng: torch.Generator, *, pad: int = 0, flip: bool = False) -> None:
        self.data, self.rng, self.pad, self.flip = data, rng, pad, flip
        self._plain = False
        self._order: Tensor | None = None

    def __call__(self, n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`n` images drawn with replacement and their labels; with `labels` (n,), image i has label i.

        Images are float32 in [0, 1]. Raises UserError for a label that no image has.
        """
        if labels is None:
            indices = torch.randint(0, len(self.data), (n,), generator=self.rng)
        else:
            if len(labels) != n:
                raise ValueError(f"draw({n}) was given {len(labels)} labels")
            with torch._C.DisableTorchFunction():  # drawn on the host, whatever becomes of other draws of the step
                indices = self._of_class(labels.cpu())
        indices = indices.to(self.data.labels.device)
        if self._plain or not (self.pad or self.flip):
            return self.data.x(indices), self.data.labels[indices]
        images = self.data.augmented(indices, self.rng, pad=self.pad, flip=self.flip)
        return images, self.data.labels[indices]

    @contextmanager
    def plain(self) -> Iterator[None]:
        """While open, nothing is augmented."""
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    def _of_class(self, labels: Tensor) -> Tensor:
        if self._order is None:  # samples sorted by class, and where each class begins
            known = self.data.labels.cpu()
            self._order = known.argsort(stable=True)
            self._counts = torch.bincount(known)
            self._starts = self._counts.cumsum(0) - self._counts
        absent = (labels < 0) | (labels >= len(self._counts))
        counts = self._counts[labels.clamp(0, len(self._counts) - 1)].masked_fill(absent, 0)
        if bool((counts == 0).any()):
            raise UserError(f"no training image has label {int(labels[counts == 0][0])}")
        share = torch.rand(len(labels), generator=self.rng, dtype=torch.float64)
        return self._order[self._starts[labels] + (share * counts).long()]
