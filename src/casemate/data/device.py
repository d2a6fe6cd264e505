"""A whole dataset as one uint8 tensor on the device, cut into batches and augmented there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.data.base import Images
from casemate.errors import UserError
from casemate.seeding import generator


class Batch(NamedTuple):
    """One step's images float32 in [0, 1] (B x C x H x W), labels int64 (B,) and sample indices int64 (B,)."""

    x: Tensor
    y: Tensor
    indices: Tensor


class DeviceData:
    """Images (uint8, N x C x H x W) and labels (int64, N) resident on a device.

    With `channels_last`, batches have that memory format (and the same values). The order of samples and all
    augmentation are drawn on the CPU from (seed, epoch) alone: the same on every device, and any epoch can be
    produced, from any batch on, without those before it.
    """

    def __init__(self, images: Images, device: torch.device | str = "cpu", *, channels_last: bool = False) -> None:
        if len(images) == 0:
            raise UserError("a dataset without images")
        self.device = torch.device(device)
        self.channels_last = channels_last
        # N x H x W x C in memory: a crop then copies whole runs of W x C bytes
        self._stored = torch.from_numpy(np.array(images.images, dtype=np.uint8, order="C")).to(self.device)
        self.labels = torch.from_numpy(np.array(images.labels, dtype=np.int64)).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All images, uint8, N x C x H x W: a view."""
        return self._stored.permute(0, 3, 1, 2)

    def x(self, indices: Tensor) -> Tensor:
        """The images of those indices (int64, on the device), float32 in [0, 1]."""
        return self._float(self._stored.index_select(0, indices))

    def augmented(self, indices: Tensor, rng: torch.Generator, *, pad: int, flip: bool) -> Tensor:
        """As `x`, each image cropped and mirrored at random as in `batches`; what is drawn depends on `rng` alone."""
        images = self._stored.index_select(0, indices)
        if pad:
            top, left = torch.randint(0, 2 * pad + 1, (2, len(indices)), generator=rng).to(self.device)
            images = crop(images, pad, top, left)
        if flip:
            images = mirror(images, (torch.rand(len(indices), generator=rng) < 0.5).to(self.device))
        return self._float(images)

    def batch_count(self, batch_size: int, *, drop_last: bool = False) -> int:
        """Batches in an epoch."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        pad: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one epoch in shuffled order, from batch number `start` on.

        Each sample is cropped at its own offset out of a border of `pad` zeros, then mirrored with probability 1/2 if
        `flip`. Nothing in the loop waits for the device.
        """
        count = self.batch_count(batch_size, drop_last=drop_last)
        if count == 0:
            raise UserError(f"batch size {batch_size:,} is more than the {len(self):,} training images")
        draw = generator(seed, "batches", epoch)
        n = len(self)
        order = torch.randperm(n, generator=draw).to(self.device)
        offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=draw).to(self.device)
        mirrored = (torch.rand(n, generator=draw) < 0.5).to(self.device)
        for number in range(start, count):
            at = slice(number * batch_size, (number + 1) * batch_size)
            indices = order[at]
            images = self._stored.index_select(0, indices)
            if pad:
                images = crop(images, pad, offsets[0, at], offsets[1, at])
            if flip:
                images = mirror(images, mirrored[at])
            yield Batch(self._float(images), self.labels.index_select(0, indices), indices)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """All images in their own order, without augmentation."""
        for first in range(0, len(self), batch_size):
            indices = torch.arange(first, min(first + batch_size, len(self)), device=self.device)
            yield Batch(self.x(indices), self.labels[indices], indices)

    def _float(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout).div_(255)


# index_select copies whole runs; the same with x[i, j] or torch.where costs 2 to 19 times as much on a CPU


def crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Images (B x H x W x C), padded by `pad` zeros all round, each cut at its own `top`, `left` (B,) in 0..2 pad."""
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    tall, wide = height + 2 * pad, width + 2 * pad
    # row p of `runs` is the `width` pixels from pixel p on, so one index a row of the result says it all
    runs = padded.as_strided((count * tall * wide - width + 1, width * channels), (channels, 1))
    rows = torch.arange(count, device=images.device) * tall + top
    first = (rows.view(-1, 1) + torch.arange(height, device=images.device)) * wide + left.view(-1, 1)
    return runs.index_select(0, first.view(-1)).view(count, height, width, channels)


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B x H x W x C), those with `chosen` (bool, B) mirrored left to right."""
    both = torch.cat((images, images.flip(2)))
    count = len(images)
    return both.index_select(0, torch.arange(count, device=images.device) + count * chosen)
