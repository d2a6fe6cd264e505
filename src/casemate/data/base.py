"""The dataset contract: where the bytes come from, what they must hash to, and how they are split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from casemate.registry import resolve

if TYPE_CHECKING:
    import numpy as np

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """uint8 images N x H x W x C and int64 labels (N,), in the canonical order of the data set."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Dataset(ABC):
    """Base of every registered dataset: a `@spec` class. No torch is imported here."""

    input_shape: ClassVar[tuple[int, int, int]]
    """(C, H, W)"""
    classes: ClassVar[tuple[str, ...]]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    """Per channel, in [0, 1] units: what a network's normaliser may use."""
    pad: ClassVar[int] = 0
    """Random-crop padding of the usual augmentation; 0 for none."""
    flip: ClassVar[bool] = False

    @abstractmethod
    def fetch(self, folder: Path) -> str:
        """Make `folder` hold the canonical files (train_images.npy, ...), verified by checksum; does nothing if it
        already does. Returns the source that served. Raises UserError with every source tried."""

    @abstractmethod
    def load(self, folder: Path, split: Split) -> Images:
        """The verified images of a split. Raises UserError, naming the mend, if `folder` does not hold them."""


class Loaded(NamedTuple):
    """A dataset with both of its splits."""

    dataset: Dataset
    train: Images
    test: Images


def build_dataset(name: str) -> Dataset:
    """The registered dataset of that name. Raises UserError with the near matches."""
    made: Dataset = resolve("dataset", name)()
    return made


def fetch_dataset(name: str, root: Path) -> str:
    """Make `root/name` hold the canonical files of a dataset; returns the source that served."""
    return build_dataset(name).fetch(root / name)


def load_dataset(name: str, root: Path) -> Loaded:
    """The verified images of `root/name`. Raises UserError, naming the mend, if they are not there."""
    dataset = build_dataset(name)
    return Loaded(dataset, dataset.load(root / name, "train"), dataset.load(root / name, "test"))
