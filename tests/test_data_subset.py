"""The ImageNet subset: verified pictures, counted, the same every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casemate.data.subset import IMAGENET10, build_subset
from casemate.errors import UserError

ONE, TWO = "n02793495", "n09472597"


def fill(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng([first + i, *folder.as_posix().encode()]).integers(0, 256, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{first + i}.JPEG")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    source = tmp_path / "imagenet"
    fill(source / ONE, 20)
    fill(source / TWO, 20)
    return source


def test_counts_checksums_and_disjoint_splits(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = build_subset(flat, out, [ONE, TWO], per_class_train=8, per_class_val=4)
    assert manifest["counts"] == {w: {"train": 8, "val": 4} for w in (ONE, TWO)}
    assert manifest["classes"] == {ONE: "barn", TWO: "volcano"} and manifest["missing"] == []
    assert json.loads((out / "manifest.json").read_text()) == manifest
    on_disk = {p.relative_to(out).as_posix(): p for p in out.rglob("*.JPEG")}
    assert set(on_disk) == set(manifest["files"]) and len(on_disk) == 24
    for name, entry in manifest["files"].items():
        content = on_disk[name].read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert (flat / entry["from"]).read_bytes() == content
    assert len({entry["from"] for entry in manifest["files"].values()}) == 24
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_it_is_the_same_every_time_and_replaces_itself(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build_subset(flat, out, [ONE], 8, 4)
    again = build_subset(flat, out, [ONE], 8, 4)
    assert first == again and sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "imagenet", "out"]
    smaller = build_subset(flat, out, [ONE], 2, 1)
    assert len(list(out.rglob("*.JPEG"))) == 3 == len(smaller["files"])


def test_a_val_folder_is_respected(tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    fill(source / "train" / ONE, 6)
    fill(source / "val" / ONE, 6, first=100)
    manifest = build_subset(source, tmp_path / "out", [ONE], per_class_train=5, per_class_val=2)
    origins = {name.split("/")[0]: [] for name in manifest["files"]}
    for name, entry in manifest["files"].items():
        origins[name.split("/")[0]].append(entry["from"].split("/")[0])
    assert origins == {"val": ["val"] * 2, "train": ["train"] * 5}


def test_a_class_with_too_few_pictures_is_cut_in_proportion(tmp_path: Path) -> None:
    fill(tmp_path / "imagenet" / ONE, 10)
    fill(tmp_path / "imagenet" / TWO, 1)
    manifest = build_subset(tmp_path / "imagenet", tmp_path / "out", [ONE, TWO], 80, 20)
    assert manifest["counts"] == {ONE: {"train": 8, "val": 2}, TWO: {"train": 1, "val": 0}}


def test_bad_pictures_are_listed_and_replaced_by_the_next(flat: Path, tmp_path: Path) -> None:
    files = sorted((flat / ONE).iterdir())
    for file in files[:5]:
        file.write_bytes(file.read_bytes()[:40])
    files[5].write_text("")
    manifest = build_subset(flat, tmp_path / "out", [ONE], per_class_train=13, per_class_val=2)
    assert manifest["counts"] == {ONE: {"val": 2, "train": 12}}  # all 14 good ones
    assert set(manifest["unreadable"]) == {f"{ONE}/{file.name}" for file in files[:6]}


def test_pictures_that_are_not_rgb_become_rgb_png(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet" / ONE
    folder.mkdir(parents=True)
    Image.new("L", (8, 8), 90).save(folder / "grey.jpg")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(folder / "print.jpg")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(folder / "alpha.png")
    manifest = build_subset(tmp_path / "imagenet", tmp_path / "out", [ONE], 3, 0)
    assert {n.split("/")[-1]: e["converted"] for n, e in manifest["files"].items()} == {
        "grey.jpg.png": "L to RGB",
        "print.jpg.png": "CMYK to RGB",
        "alpha.png.png": "RGBA to RGB",
    }
    for name, entry in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        with Image.open(tmp_path / "out" / name) as made:
            assert made.mode == "RGB"
    with Image.open(tmp_path / "out" / "train" / ONE / "grey.jpg.png") as made:
        assert np.asarray(made).tolist() == [[[90, 90, 90]] * 8] * 8


def test_a_picture_is_never_in_both_splits(tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    fill(source / "train" / ONE, 4)
    (source / "val" / ONE).mkdir(parents=True)
    fill(source / "val" / ONE, 1, first=50)
    (source / "val" / ONE / "copy.JPEG").write_bytes((source / "train" / ONE / "0.JPEG").read_bytes())
    manifest = build_subset(source, tmp_path / "out", [ONE], 4, 2)
    assert manifest["counts"] == {ONE: {"val": 2, "train": 3}}
    assert manifest["duplicates"] == {f"train/{ONE}/0.JPEG": f"val/{ONE}/copy.JPEG"}


def test_missing_classes_are_listed_unless_allowed(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_subset(flat, tmp_path / "out")
    assert "n09193705 (alp)" in str(caught.value) and "n12985857 (coral fungus)" in str(caught.value)
    assert ONE not in str(caught.value) and not (tmp_path / "out").exists()
    manifest = build_subset(flat, tmp_path / "out", per_class_train=2, per_class_val=1, allow_missing=True)
    assert set(manifest["missing"]) == set(IMAGENET10) - {ONE, TWO} and manifest["wnids"] == list(IMAGENET10)
    with pytest.raises(UserError, match="no training pictures of n00000000"):
        build_subset(flat, tmp_path / "out", ["n00000000"], allow_missing=True)


def test_mistakes_are_named_and_nothing_is_lost(flat: Path, tmp_path: Path) -> None:
    for out in (flat, flat / "inside", flat.parent):
        with pytest.raises(UserError, match="overlaps"):
            build_subset(flat, out, [ONE])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        build_subset(flat, tmp_path / "home", [ONE])
    assert (tmp_path / "home" / "thesis.txt").exists() and len(list(flat.rglob("*.JPEG"))) == 40
    with pytest.raises(UserError, match="is not a folder"):
        build_subset(tmp_path / "gone", tmp_path / "out", [ONE])
    with pytest.raises(UserError, match=r"got \.\./x"):
        build_subset(flat, tmp_path / "out", ["../x"])
    with pytest.raises(UserError, match="each given once"):
        build_subset(flat, tmp_path / "out", [ONE, ONE])
    with pytest.raises(UserError, match="per_class_train 0"):
        build_subset(flat, tmp_path / "out", [ONE], per_class_train=0)
