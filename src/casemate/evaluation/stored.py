"""Images on demand: a study looks at few of thousands of adversarial images; none is read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from casemate.evaluation import segments

Take = Callable[[Sequence[int]], np.ndarray]
"""Indices of the test split -> their images, N x C x H x W float32 in [0, 1]."""


class Images(Protocol):
    """N x C x H x W float32 in [0, 1], to be indexed by image: an array, or `OnDemand`."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: Any) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class OnDemand:
    """The images with these `indices`, which `take` reads whenever one of them, or several, are asked for."""

    indices: np.ndarray
    take: Take

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: Any) -> np.ndarray:
        wanted = self.indices[at]
        if np.ndim(wanted) == 0:
            image: np.ndarray = self.take([int(wanted)])[0]
            return image
        return self.take([int(index) for index in wanted])


@dataclass(frozen=True, eq=False)
class Stored:
    """Adversarial images in segments of the ledger: their indices are known, and a segment at a time is read."""

    place: dict[int, Path]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Stored:
        return cls({index: path for path in paths for index in segments.read_indices(path)})

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """Of at least one image. Raises ValueError if a segment does not fit its checksum."""
        found: dict[int, np.ndarray] = {}
        for path in dict.fromkeys(self.place[index] for index in indices):
            held = segments.read_images(path)
            found |= {
                index: held[index].copy() for index in indices if index in held
            }  # a view holds the whole segment
        return np.stack([found[index] for index in indices])
