"""CIFAR-10 as its official binary batches, brought to a machine a few files at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from casemate.data.base import Images
from casemate.data.cifar10 import CIFAR10
from casemate.errors import UserError

RECORD, RECORDS = 1 + 3 * 32 * 32, 10_000
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"


def collect(folders: Sequence[Path], store: Path, records: int = RECORDS) -> list[str]:
    """Copy the batches found under `folders` into `store`, which outlives a command; the names that are there now.

    Raises UserError, naming file and sizes, for one that is cut short or is none.
    """
    store.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for name in (*TRAIN, TEST):
            for path in sorted(folder.rglob(name)):
                if path.parent.resolve() == store.resolve():
                    continue
                _read(path, records)
                temporary = store / f".{name}.tmp"
                shutil.copyfile(path, temporary)
                temporary.replace(store / name)
                break
    return [name for name in (*TRAIN, TEST) if (store / name).exists()]


def load(store: Path, records: int = RECORDS) -> tuple[Images, Images, bool]:
    """(training images, test images, whether both are the whole data set as published, by checksum).

    Raises UserError if there is no training batch or no test batch.
    """
    train = [_read(store / name, records) for name in TRAIN if (store / name).exists()]
    if not train or not (store / TEST).exists():
        raise UserError(f"{store} holds no {TEST if train else 'training batch'}: carry data_batch_*.bin and {TEST}")
    joined = Images(np.concatenate([p.images for p in train]), np.concatenate([p.labels for p in train]))
    test, known = _read(store / TEST, records), CIFAR10()
    arrays = {
        "train_images": joined.images, "train_labels": joined.labels.astype(np.uint8), "test_images": test.images,
        "test_labels": test.labels.astype(np.uint8),
    }  # fmt: skip
    whole = len(train) == len(TRAIN) and records == RECORDS
    whole = whole and all(known.digest(k, np.ascontiguousarray(v)) == known.checksums[k] for k, v in arrays.items())
    return joined, test, whole


def _read(path: Path, records: int) -> Images:
    content = np.fromfile(path, np.uint8)
    if len(content) != records * RECORD:
        raise UserError(f"{path} has {len(content):,} of {records * RECORD:,} bytes: cut short, carry it again")
    rows = content.reshape(records, RECORD)
    if int(rows[:, 0].max()) > 9:
        raise UserError(f"{path} has a label above 9: it is no CIFAR-10 batch, carry it again")
    images = np.ascontiguousarray(rows[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(images, rows[:, 0].astype(np.int64))
