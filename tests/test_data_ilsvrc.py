"""ImageNet's official archives in small: a tar of tars, the validation tar with its maps, and damage to them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import tar
from PIL import Image
from scipy.io import savemat

from casemate.data import ilsvrc
from casemate.data.subset import build_subset, summary
from casemate.errors import UserError

ONE, TWO = "n02793495", "n09472597"
OTHER = "n01440764"
VAL_WNIDS = [ONE, TWO, OTHER, ONE, TWO, ONE]


def jpeg(number: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    shape = (8, 8) if mode == "L" else (8, 8, len(mode))
    pixels = np.random.default_rng(number).integers(0, 256, shape)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8), mode).save(out, format=kind)
    return out.getvalue()


def train_pictures(wnid: str, count: int = 6) -> dict[str, bytes]:
    first = {ONE: 0, TWO: 100, OTHER: 200}[wnid]
    return {f"{wnid}_{i}.JPEG": jpeg(first + i) for i in range(count)}


def val_pictures() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(1000 + i) for i in range(1, len(VAL_WNIDS) + 1)}


def devkit() -> dict[str, bytes]:
    """meta.mat as it comes: the classes in an order of their own, and a synset above them."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [
        (1, OTHER, "tench", "", 0),
        (2, TWO, "volcano", "", 0),
        (3, ONE, "barn", "", 0),
        (4, "n00001740", "entity", "", 3),
    ]
    synsets = np.array(rows, dtype=kinds)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets.reshape(-1, 1)})
    number = {row[1]: row[0] for row in rows}
    truth = "".join(f"{number[w]}\n" for w in VAL_WNIDS)
    base = "ILSVRC2012_devkit_t12/data/"
    return {base + ilsvrc.META: mat.getvalue(), base + ilsvrc.TRUTH: truth.encode(), base + "readme": b"x"}


def official(folder: Path, **files: bytes | None) -> Path:
    """The three archives, or what is given instead of them (train, val, devkit; None for none)."""
    folder.mkdir(exist_ok=True)
    inner = {f"{w}.tar": tar(train_pictures(w)) for w in (OTHER, ONE, TWO)}
    made = {"train": tar(inner), "val": tar(val_pictures()), "devkit": tar(devkit(), "w:gz")} | files
    for name, file in (("train", ilsvrc.TRAIN), ("val", ilsvrc.VAL), ("devkit", ilsvrc.DEVKIT)):
        content = made[name]
        if content is not None:
            (folder / file).write_bytes(content)
    return folder


def unpacked(folder: Path, *, flat_val: bool = False) -> Path:
    """The same pictures in folders."""
    for wnid in (ONE, TWO, OTHER):
        (folder / "train" / wnid).mkdir(parents=True)
        for name, content in train_pictures(wnid).items():
            (folder / "train" / wnid / name).write_bytes(content)
    for (name, content), wnid in zip(val_pictures().items(), VAL_WNIDS, strict=True):
        here = folder / "val" if flat_val else folder / "val" / wnid
        here.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    return folder


def build(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return build_subset(source, out, options.pop("wnids", [ONE, TWO]), 4, 2, **options)


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*") if p.name != "manifest.json"}


def test_archives_give_what_their_folders_give(tmp_path: Path) -> None:
    packed = build(official(tmp_path / "packed"), tmp_path / "a")
    plain = build(unpacked(tmp_path / "plain"), tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b") and len(content(tmp_path / "a")) == 12
    assert packed["counts"] == plain["counts"] == {w: {"train": 4, "val": 2} for w in (ONE, TWO)}
    assert {n: e["sha256"] for n, e in packed["files"].items()} == {n: e["sha256"] for n, e in plain["files"].items()}
    origins = [entry["from"] for entry in packed["files"].values()]
    assert sum(o.startswith(f"{ilsvrc.TRAIN}/{ONE}.tar/{ONE}_") for o in origins) == 4
    assert sum(o.startswith(f"{ilsvrc.VAL}/ILSVRC2012_val_0000000") for o in origins) == 4
    for name in packed["files"]:
        split, wnid, file = name.split("/")
        if split == "val":
            assert VAL_WNIDS[int(file[15:23]) - 1] == wnid


def test_only_what_is_taken_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive of the class that is not asked for is damaged in its pictures' headers: nobody looks."""
    inner = {
        f"{OTHER}.tar": b"\xff" * 2048,
        f"{ONE}.tar": tar(train_pictures(ONE)),
        f"{TWO}.tar": tar(train_pictures(TWO)),
    }
    read = []
    stream = ilsvrc.Members.stream
    monkeypatch.setattr(ilsvrc.Members, "stream", lambda self, name: (read.append(name), stream(self, name))[1])
    build(official(tmp_path / "packed", train=tar(inner)), tmp_path / "out")
    assert sorted(n for n in read if n.endswith(".tar")) == [f"{ONE}.tar", f"{TWO}.tar"] and len(read) == 2 + 12
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == sorted(
        [ilsvrc.TRAIN, ilsvrc.VAL, ilsvrc.DEVKIT]
    )


@pytest.mark.parametrize(
    "written",
    [
        ("val_map.txt", lambda name, wnid: f"{name}.JPEG {wnid}\n"),
        ("LOC_val_solution.csv", lambda name, wnid: f"{name},{wnid} 85 1 499 272 {OTHER} 1 2 3 4\n"),
        ("valprep.sh", lambda name, wnid: f"mv {name}.JPEG {wnid}/\n"),
        ("imagenet_2012_validation_synset_labels.txt", lambda name, wnid: f"{wnid}\n"),
    ],
    ids=lambda w: w[0],
)
def test_a_text_file_can_stand_for_the_devkit(written: tuple[str, Callable[[str, str], str]], tmp_path: Path) -> None:
    name, line = written
    source = official(tmp_path / "packed", devkit=None)
    header = "ImageId,PredictionString\n" if name.endswith("csv") else ""
    lines = [line(p.removesuffix(".JPEG"), w) for p, w in zip(val_pictures(), VAL_WNIDS, strict=True)]
    (source / name).write_text(header + "".join(lines))
    build(source, tmp_path / "out")
    build(official(tmp_path / "with devkit"), tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_an_unpacked_devkit_and_validation_pictures_in_one_folder(tmp_path: Path) -> None:
    source = unpacked(tmp_path / "flat", flat_val=True)
    with pytest.raises(UserError, match=r"classes of the validation .*nothing tells them; put ILSVRC2012_dev"):
        build(source, tmp_path / "out")
    for name, made in devkit().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(made)
    build(source, tmp_path / "out")
    build(official(tmp_path / "packed"), tmp_path / "expected")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@pytest.mark.parametrize("below", ["", "train"])
def test_a_tar_for_each_class(below: str, tmp_path: Path) -> None:
    source = official(tmp_path / "packed", train=None)
    (source / below).mkdir(exist_ok=True)
    for wnid in (ONE, TWO):
        (source / below / f"{wnid}.tar").write_bytes(tar(train_pictures(wnid)))
    made = build(source, tmp_path / "out")
    assert made["counts"] == {w: {"train": 4, "val": 2} for w in (ONE, TWO)}


def test_the_training_archive_alone_is_cut_in_proportion(tmp_path: Path) -> None:
    made = build(official(tmp_path / "packed", val=None, devkit=None), tmp_path / "out")
    assert made["counts"] == {w: {"train": 4, "val": 2} for w in (ONE, TWO)}
    assert all(entry["from"].startswith(ilsvrc.TRAIN) for entry in made["files"].values())


def test_what_is_wrong_with_pictures_in_an_archive_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {
        f"{ONE}_0.JPEG": jpeg(0, "L"), f"{ONE}_1.JPEG": jpeg(1, "CMYK"), f"{ONE}_2.JPEG": jpeg(2, "RGBA", "PNG"),
        f"{ONE}_3.JPEG": jpeg(3)[:200], f"{ONE}_4.JPEG": b"", f"{ONE}_5.JPEG": jpeg(5, "RGB", "PNG"),
        f"{ONE}_6.JPEG": jpeg(5, "RGB", "PNG"), f"{ONE}_7.JPEG": b"x" * 4000, "notes.txt": b"no picture",
    }  # fmt: skip
    monkeypatch.setattr(ilsvrc, "LARGEST", 3000)
    train = tar({f"{ONE}.tar": tar(odd), f"{TWO}.tar": tar(train_pictures(TWO))})
    made = build_subset(official(tmp_path / "packed", train=train), tmp_path / "out", [ONE, TWO], 6, 1)
    where = f"{ilsvrc.TRAIN}/{ONE}.tar/{ONE}_"
    assert set(made["unreadable"]) == {f"{where}{i}.JPEG" for i in (3, 4, 7)}
    assert "more than 3,000" in made["unreadable"][f"{where}7.JPEG"] and len(made["duplicates"]) == 1
    converted = {e["from"][-6]: e["converted"] for e in made["files"].values() if "converted" in e}
    assert converted == {"0": "L to RGB", "1": "CMYK to RGB", "2": "RGBA to RGB"}
    for path in (tmp_path / "out" / "train" / ONE).iterdir():
        with Image.open(path) as opened:
            assert opened.mode == "RGB"
    assert made["short"] == {ONE: {"train": {"taken": 4, "wanted": 6}}}
    assert list(summary(made)) == [
        "12 pictures of 2 classes; 3 converted to RGB, 3 unreadable and 1 copies left out",
        f"{ONE} (barn): 4 of 6 train",
    ]


def test_missing_classes_are_named_unless_allowed(tmp_path: Path) -> None:
    source = official(tmp_path / "packed", train=tar({f"{ONE}.tar": tar(train_pictures(ONE))}))
    with pytest.raises(UserError, match=r"no training pictures of n09472597 \(volcano\); expected .*img_train\.tar"):
        build(source, tmp_path / "out")
    made = build(source, tmp_path / "out", allow_missing=True)
    assert made["missing"] == [TWO] and made["counts"][TWO] == {"train": 0, "val": 2}
    assert made["short"] == {TWO: {"train": {"taken": 0, "wanted": 4}}}


def twice() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo(f"{ONE}.tar"), io.BytesIO())
    return out.getvalue()


DATA = "ILSVRC2012_devkit_t12/data/"
BARNS = tar({f"{ONE}.tar": tar(train_pictures(ONE))})


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"train": BARNS[:2000]}, r"img_train\.tar is not a readable archive"),
        (
            {"train": tar({f"{ONE}.tar": tar(train_pictures(ONE))[:1000]})},
            r"n02793495\.tar in .*train\.tar is not a",
        ),
        ({"train": tar({f"{ONE}.tar": tar({"../../evil.JPEG": b"x"})})}, "points outside the archive"),
        ({"train": tar({f"/{ONE}.tar": b""})}, "points outside the archive"),
        ({"train": twice()}, r"holds two files named 'n02793495\.tar'"),
        ({"train": tar({f"{ONE}.tar": tar(train_pictures(ONE))}, "w:gz")}, "is not a readable archive"),
        ({"val": tar(val_pictures())[:3000]}, r"img_val\.tar is not a readable archive"),
        ({"devkit": tar(devkit(), "w:gz")[:-100]}, r"is not a readable archive|devkit_t12\.tar\.gz holds no meta"),
        ({"devkit": tar({"readme": b"x"}, "w:gz")}, "holds no meta.mat"),
        ({"devkit": tar(devkit() | {DATA + ilsvrc.META: b"x" * 200}, "w:gz")}, "do not fit each other"),
        ({"devkit": tar(devkit() | {DATA + ilsvrc.TRUTH: b"1 999"}, "w:gz")}, "do not fit each other"),
        ({"devkit": None}, "nothing tells them"),
    ],
)
def test_damage_is_one_line(files: dict[str, bytes | None], why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why) as caught:
        build(official(tmp_path / "packed", **files), tmp_path / "out", wnids=[ONE])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_map_that_is_none(tmp_path: Path) -> None:
    source = official(tmp_path / "packed", devkit=None)
    (source / "val_map.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    with pytest.raises(UserError, match=r"val_map\.txt has no line like"):
        build(source, tmp_path / "out")
