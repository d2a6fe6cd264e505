"""SVHN (Netzer et al. 2011): 32x32 colour house numbers, the cropped digits, from MATLAB files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data.archives import BadArchive, find
from casemate.data.files import Arrays, FileDataset, verified
from casemate.data.sources import Local, Official
from casemate.fields import spec

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


@spec
class SVHN(FileDataset):
    """73,257 + 26,032 colour images of digits. The 531,131 easier ones of "extra" are left out, as in the papers."""

    name = "svhn"
    input_shape = (3, 32, 32)
    classes = tuple("0123456789")
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    counts: ClassVar = {"train": 73_257, "test": 26_032}
    files: ClassVar = {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"}
    """md5 as torchvision gives them."""
    sources = (Local(), Official("SVHN", 246_300_000))
    bring = "train_32x32.mat and test_32x32.mat"
    space = 900_000_000

    def decode(self, folder: Path) -> Arrays:
        found = find(folder, FILES.values())
        paths = {split: verified(found[name], self.files[split], name) for split, name in FILES.items()}
        arrays: dict[str, np.ndarray] = {}
        for split, path in paths.items():
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = _read_mat(path)
        return arrays


def _read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X is 32 x 32 x 3 x N, y is N x 1 with 10 for the digit 0."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = np.moveaxis(content["X"], 3, 0), content["y"].reshape(-1)
    except Exception as error:  # its reader raises whatever its parsing meets, zlib.error and KeyError among them
        raise BadArchive(f"{path.name} is not a readable MATLAB file ({type(error).__name__}: {error})") from None
    if images.dtype != np.uint8 or labels.min() < 1 or labels.max() > 10:
        raise BadArchive(f"{path.name} holds {images.dtype} images and labels {labels.min()}..{labels.max()}")
    return images, labels.astype(np.int64) % 10
