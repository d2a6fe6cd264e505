"""CIFAR-100 (Krizhevsky 2009): 32x32 colour images of 100 classes, from the Python or the binary version."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from casemate.data.archives import BadArchive, find, read_tar
from casemate.data.files import Arrays, FileDataset, verified
from casemate.data.sources import Local, Official, SourceFailed
from casemate.fields import spec

PIXELS = 32 * 32
RECORD = 2 + 3 * PIXELS  # coarse label, fine label, red, green, blue
MEMBERS = r"cifar-100-(python/(train|test)|binary/(train|test)\.bin)"
ALLOWED = frozenset(
    {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    }
)  # fmt: skip
"""All that a pickled array of bytes needs."""


@spec
class CIFAR100(FileDataset):
    """50,000 + 10,000 colour images, labelled with the 100 fine classes."""

    name = "cifar100"
    input_shape = (3, 32, 32)
    classes = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
        "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
        "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
        "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
        "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
        "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    pad = 4
    flip = True
    counts: ClassVar = {"train": 50_000, "test": 10_000}
    archives: ClassVar = {
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    }
    """md5 as its page gives them."""
    pickles: ClassVar = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
    """md5 of the unpacked Python version, as torchvision gives them."""
    sources = (Local(), Official("CIFAR100", 169_001_437))
    bring = "cifar-100-python.tar.gz, cifar-100-binary.tar.gz or the unpacked cifar-100-python"
    space = 900_000_000

    def decode(self, folder: Path) -> Arrays:
        found = find(folder, [*self.archives, *self.pickles])
        wrong = []
        try:
            # torchvision leaves the archive and its content: the content is the shorter way
            contents = {s: verified(found[s], md5, f"cifar-100-python/{s}") for s, md5 in self.pickles.items()}
            return self._arrays({split: path.read_bytes() for split, path in contents.items()})
        except SourceFailed as error:
            wrong += [str(error)] if any(found[split] for split in self.pickles) else []
        for name, md5 in self.archives.items():
            try:
                limit = 2 * RECORD * sum(self.counts.values()) + 100_000  # pickles hold file names, too
                return self._arrays(read_tar(verified(found[name], md5, name), MEMBERS, limit=limit))
            except (SourceFailed, BadArchive) as error:
                wrong += [str(error)] if found[name] else []
        raise SourceFailed(", ".join(wrong) or f"none of {', '.join(self.archives)} there")

    def _arrays(self, files: dict[str, bytes]) -> Arrays:
        arrays: dict[str, np.ndarray] = {}
        for split, n in self.counts.items():
            if split in files:
                rows, labels = _unpickled(split, files[split])
            elif f"{split}.bin" in files:
                rows, labels = _records(split, files[f"{split}.bin"], n)
            else:
                raise BadArchive(f"holds no {split} and no {split}.bin")
            arrays[f"{split}_images"] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            arrays[f"{split}_labels"] = labels
        return arrays


class _Unpickler(pickle.Unpickler):
    """Only arrays, lists and strings: the file is known by its md5, and still nothing of it is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise BadArchive(f"a pickle asks for {module}.{name}")
        return super().find_class(module, name)


def _unpickled(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        entry = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        return np.asarray(entry["data"], dtype=np.uint8), np.asarray(entry["fine_labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadArchive(f"{name} is not what it should be ({type(error).__name__}: {error})") from None


def _records(name: str, content: bytes, rows: int) -> tuple[np.ndarray, np.ndarray]:
    if len(content) != rows * RECORD:
        raise BadArchive(f"{name}.bin holds {len(content):,} of {rows * RECORD:,} bytes: truncated")
    records = np.frombuffer(content, dtype=np.uint8).reshape(rows, RECORD)
    return records[:, 2:], records[:, 1]
