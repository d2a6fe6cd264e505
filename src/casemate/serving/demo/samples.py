"""Pictures to start with: test images of the models' dataset, where it is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from casemate.data import load_dataset
from casemate.errors import UserError
from casemate.registry import names


@dataclass(frozen=True)
class Samples:
    """images N x H x W x C uint8 and labels (N,), in the dataset's order; N may be 0."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, dataset: str, root: Path, shape: tuple[int, int, int]) -> Samples:
        """Empty if the dataset is not here, or is none of the project's, or of another shape."""
        empty = cls(np.zeros((0, *shape[1:], shape[0]), np.uint8), np.zeros(0, np.int64))
        if dataset not in names("dataset") or not (root / dataset).is_dir():
            return empty
        try:
            test = load_dataset(dataset, root).test
        except UserError:
            return empty
        if test.images.shape[1:] != (*shape[1:], shape[0]):
            return empty
        return cls(test.images, test.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: int) -> tuple[np.ndarray, int]:
        """(1 x C x H x W float32 in [0, 1], label)."""
        image = self.images[index : index + 1].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        return np.ascontiguousarray(image), int(self.labels[index])

    def some(self, count: int, page: int) -> list[int]:
        """Indices for a page of the picker: as many of each class as fit, another page others of them."""
        rng = np.random.default_rng(page)
        classes = sorted(set(self.labels.tolist()))
        chosen: list[int] = []
        while len(chosen) < min(count, len(self)):
            for label in classes if len(classes) <= count else rng.permutation(classes):
                left = np.setdiff1d(np.flatnonzero(self.labels == label), chosen)
                if len(left) and len(chosen) < count:
                    chosen.append(int(rng.choice(left)))
        return chosen
