"""The two forms that CIFAR-10's mirrors come in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_toys import arrays_of, small

from casemate.data.cifar10 import BATCHES, BINARY, CIFAR10, LABELS, SHEETS
from casemate.data.sources import SourceFailed


def binary_files() -> dict[str, bytes]:
    arrays = arrays_of(CIFAR10)
    files = {}
    for split, batches in BATCHES.items():
        images = np.split(arrays[f"{split}_images"], len(batches))
        labels = np.split(arrays[f"{split}_labels"], len(batches))
        for name, x, y in zip(batches, images, labels, strict=True):
            files[f"{name}.bin"] = b"".join(
                bytes([int(label)]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(x, y, strict=True)
            )
    return files


def sheet_files() -> dict[str, bytes]:
    from PIL import Image

    arrays, files = arrays_of(CIFAR10), {}
    for split, batches in BATCHES.items():
        for name, x in zip(batches, np.split(arrays[f"{split}_images"], len(batches)), strict=True):
            out = io.BytesIO()
            Image.fromarray(x.reshape(len(x), 1024, 3)).save(out, format="PNG")
            files[f"{name}.png"] = out.getvalue()
        files[LABELS[split]] = json.dumps(arrays[f"{split}_labels"].tolist()).encode()
    return files


@pytest.mark.parametrize("made", [binary_files, sheet_files])
def test_both_forms_of_cifar10_decode_to_the_same(made: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    for name, content in made().items():
        (tmp_path / name).write_bytes(content)
    dataset = small(CIFAR10)
    dataset.verify(dataset.decode(tmp_path))


def test_the_mirrors_want_exactly_those_members() -> None:
    for mirror, made, prefix in (
        (BINARY, binary_files, "package/cifar-10-batches-bin/"),
        (SHEETS, sheet_files, "package/"),
    ):
        assert all(re.fullmatch(mirror.members, prefix + name) for name in made())
        assert not re.fullmatch(mirror.members, "package/package.json")


def test_damaged_cifar10_files_say_which(tmp_path: Path) -> None:
    files = binary_files()
    files["data_batch_3.bin"] = files["data_batch_3.bin"][:-5]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceFailed, match=r"data_batch_3.bin holds .* truncated"):
        small(CIFAR10).decode(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(SourceFailed, match="neither six"):
        small(CIFAR10).decode(tmp_path)
    for name, content in sheet_files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "test_batch.png").write_bytes(sheet_files()["data_batch_1.png"])
    with pytest.raises(SourceFailed, match=r"test_batch.png is \(1024, 10\)"):
        small(CIFAR10).decode(tmp_path)
