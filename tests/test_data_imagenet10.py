"""The registered ten-class set: from archives, folders and built subsets, with what is short said and recorded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from data_toys import tar
from PIL import Image

from casemate.data import build_dataset
from casemate.data.imagenet10 import ImageNet10
from casemate.data.sources import LOCAL_VARIABLE
from casemate.data.subset import IMAGENET10, build_subset
from casemate.errors import UserError


def fill(root: Path, counts: dict[str, tuple[int, int]], size: tuple[int, int] = (12, 10)) -> Path:
    """`counts` (train, val) pictures of each class, each of one colour of its own."""
    for label, (wnid, both) in enumerate(counts.items()):
        for split, count in zip(("train", "val"), both, strict=True):
            for i in range(count):
                (root / split / wnid).mkdir(parents=True, exist_ok=True)
                color = (10 * label, 100 + i, 255 * (split == "val"))
                Image.new("RGB", size, color).save(root / split / wnid / f"{wnid}_{i}.png")
    return root


def small(**attributes: object) -> ImageNet10:
    """At 6x6, and two training pictures and one test picture a class."""
    made: ImageNet10 = type(
        "ImageNet10", (ImageNet10,), {"input_shape": (3, 6, 6), "counts": {"train": 20, "test": 10}, **attributes}
    )()
    return made


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "mine"))
    return tmp_path / "mine"


def test_pictures_become_arrays_in_the_order_of_the_classes(data: Path, tmp_path: Path) -> None:
    fill(data, dict.fromkeys(IMAGENET10, (3, 2)))
    dataset = small()
    assert dataset.fetch(tmp_path / "raw") == f"local files ({LOCAL_VARIABLE})"
    train, test = (dataset.load(tmp_path / "raw", split) for split in ("train", "test"))
    assert train.images.shape == (20, 6, 6, 3) and test.images.shape == (10, 6, 6, 3)
    assert train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert (test.images[:, 2, 3, 0] == 10 * np.arange(10)).all() and (test.images[..., 2] == 255).all()
    assert dataset.fetch(tmp_path / "raw") == "already there"
    manifest = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert manifest["counts"]["train"] == dict.fromkeys(IMAGENET10, 2)
    assert manifest["arrays"]["train_images"]["shape"] == [20, 6, 6, 3]


def test_archives_and_a_built_subset_give_the_same_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = fill(tmp_path / "folders", dict.fromkeys(IMAGENET10, (2, 1)))
    data.mkdir()
    inner = {f"{w}.tar": tar({p.name: p.read_bytes() for p in (folders / "train" / w).iterdir()}) for w in IMAGENET10}
    (data / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    names = {w: f"ILSVRC2012_val_{i:08d}" for i, w in enumerate(IMAGENET10)}
    val = {f"{n}.JPEG": next((folders / "val" / w).iterdir()).read_bytes() for w, n in names.items()}
    (data / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    (data / "val_map.txt").write_text("".join(f"{n} {w}\n" for w, n in names.items()))
    small().fetch(tmp_path / "a")
    build_subset(data, tmp_path / "subset", per_class_train=2, per_class_val=1)
    for name, source in (("b", tmp_path / "subset"), ("c", folders)):
        monkeypatch.setenv(LOCAL_VARIABLE, str(source))
        small().fetch(tmp_path / name)
        for split in ("train", "test"):
            one, other = (small().load(tmp_path / at, split) for at in ("a", name))
            assert np.array_equal(one.labels, other.labels)
            order = [np.lexsort(x.images.reshape(len(x), -1).T) for x in (one, other)]
            assert np.array_equal(one.images[order[0]], other.images[order[1]])


def test_too_few_pictures_are_accepted_said_and_recorded(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = dict.fromkeys(IMAGENET10, (2, 1)) | {"n03743016": (1, 1)}
    fill(data, counts)
    (data / "train" / "n02793495" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with caplog.at_level(logging.WARNING):
        small(counts={"train": 30, "test": 10}).fetch(tmp_path / "raw")
    assert "imagenet10: megalith (n03743016) has 1 of 3 train pictures" in caplog.messages
    assert any("1 pictures left out as unreadable, such as train/n02793495/broken.jpg" in m for m in caplog.messages)
    loaded = small(counts={"train": 30, "test": 10}).load(tmp_path / "raw", "train")
    assert len(loaded) == 19 and np.bincount(loaded.labels).tolist() == [2, 1, *[2] * 8]
    with pytest.raises(UserError, match="has shape"):
        small(counts={"train": 10, "test": 10}).load(tmp_path / "raw", "train")


def test_a_missing_class_is_an_error_unless_the_subset_was_built_without_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(data, dict.fromkeys(list(IMAGENET10)[:8], (2, 1)))
    with pytest.raises(UserError, match=r"no training pictures of n09472597 \(volcano\), n12985857 \(coral fungus\)"):
        small().fetch(tmp_path / "raw")
    build_subset(data, tmp_path / "subset", per_class_train=2, per_class_val=1, allow_missing=True)
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "subset"))
    small().fetch(tmp_path / "raw")
    assert len(small().load(tmp_path / "raw", "train")) == 16


def test_without_a_copy_the_message_says_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"imagenet10; tried .* put ILSVRC2012_img_train\.tar, .*val/WNID, in"):
        small().fetch(tmp_path / "raw")
    monkeypatch.setenv(LOCAL_VARIABLE, str(fill(tmp_path / "mine", dict.fromkeys(IMAGENET10, (1, 0)))))
    with pytest.raises(UserError, match="has no pictures for the test split"):
        small().fetch(tmp_path / "raw")


def test_the_registered_set_is_the_papers() -> None:
    dataset = build_dataset("imagenet10")
    assert dataset.counts == {"train": 13_000, "test": 500}  # type: ignore[attr-defined]
    assert dataset.input_shape == (3, 224, 224) and dataset.classes[0] == "barn" and len(dataset.classes) == 10


def test_six_classes_at_64_pixels(data: Path, tmp_path: Path) -> None:
    from casemate.data.imagenet10_small import ImageNet10Small

    kind = type("ImageNet10Small", (ImageNet10Small,), {"counts": {"train": 12, "test": 6}})
    fill(data, dict.fromkeys(ImageNet10Small.wnids, (3, 1)), size=(70, 64))
    kind().fetch(tmp_path / "raw")
    train, test = (kind().load(tmp_path / "raw", split) for split in ("train", "test"))
    assert train.images.shape == (12, 64, 64, 3) and test.labels.tolist() == list(range(6))
    assert ImageNet10Small.classes == ("barn", "alp", "cliff", "coral reef", "lakeside", "seashore")
    (data / "train" / "n02793495").rename(data / "train" / "elsewhere")
    with pytest.raises(UserError, match=r"no training pictures of n02793495 \(barn\)"):
        kind().fetch(tmp_path / "other")
