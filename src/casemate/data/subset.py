"""The 10-class ImageNet subset, from any folder in ImageNet's layout: every picture decoded before it is taken."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casemate.data import pictures, store
from casemate.data.splits import shuffled
from casemate.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET10: Mapping[str, str] = {
    "n02793495": "barn",
    "n03743016": "megalith",
    "n09193705": "alp",
    "n09246464": "cliff",
    "n09256479": "coral reef",
    "n09332890": "lakeside",
    "n09428293": "seashore",
    "n09468604": "valley",
    "n09472597": "volcano",
    "n12985857": "coral fungus",
}
"""WordNet id -> class name, in the order of the labels."""


@dataclass
class _Record:
    """What the manifest will say."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)


def build_subset(
    source: Path,
    out: Path,
    wnids: Sequence[str] = tuple(IMAGENET10),
    per_class_train: int = 1300,
    per_class_val: int = 50,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Write `out/{train,val}/WNID/*` and `out/manifest.json`, and return the manifest.

    `source` holds WNID/* or {train,val}/WNID/*. Without a val folder, each class is shuffled by a hash of its name
    and cut in the proportion asked for. RGB files are copied byte for byte; grey, CMYK, palette and transparent ones
    are written as RGB PNG; unreadable ones, and second copies of a picture, are left out and listed, and the next
    picture takes their place. Raises UserError, naming them, on missing classes unless `allow_missing`; then, and
    for a class with too few pictures, the counts in the manifest say what there is.
    """
    _check(source, out, wnids, per_class_train, per_class_val)
    missing = [w for w in wnids if not (_files(source / "train" / w) or _files(source / w))]
    if missing and (not allow_missing or len(missing) == len(wnids)):
        named = ", ".join(f"{w} ({IMAGENET10[w]})" if w in IMAGENET10 else w for w in missing)
        raise UserError(
            f"{source} has no training pictures of {named}; expected WNID/* or train/WNID/* and val/WNID/* in it"
        )
    wanted = {"train": per_class_train, "val": per_class_val}
    record = _Record()
    with store.disk_errors(out), store.exclusive(out) as staging:
        ready = staging / "ready"
        ready.mkdir()
        counts: dict[str, dict[str, int]] = {}
        for wnid in wnids:
            pools = _pools(source, wnid, wanted)
            counts[wnid] = {s: _take(*pools[s], ready / s / wnid, record, (source, ready)) for s in ("val", "train")}
        manifest = {
            "schema": 1,
            "wnids": list(wnids),
            "classes": {w: IMAGENET10.get(w, w) for w in wnids},
            "counts": counts,
            "missing": missing,
            "files": record.files,
            "unreadable": record.unreadable,
            "duplicates": record.duplicates,
        }
        store.write_manifest(ready, manifest)
        store.put_in_place(ready, out, staging)
    return manifest


def _check(source: Path, out: Path, wnids: Sequence[str], train: int, val: int) -> None:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give one in ImageNet's layout (WNID/* or train/WNID/*)")
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} overlaps {source}; write the subset somewhere else")
    wrong = [w for w in wnids if not re.fullmatch(r"n\d{8}", w)]
    if wrong or len(set(wnids)) != len(wnids) or not wnids:
        got = ", ".join(wrong or wnids) or "none"
        raise UserError(f"WordNet ids look like n02793495, each given once; got {got}")
    if train < 1 or val < 0:
        raise UserError(f"per_class_train {train} must be 1 or more and per_class_val {val} 0 or more")


def _files(folder: Path) -> list[Path]:
    return pictures.picture_files(folder) if folder.is_dir() else []


def _pools(source: Path, wnid: str, wanted: Mapping[str, int]) -> dict[str, tuple[Iterator[Path], int]]:
    """For each split, the files to take from, in order, and how many to take; shared if there is no val folder."""
    train = _shuffle(_files(source / "train" / wnid) or _files(source / wnid), wnid)
    val = _shuffle(_files(source / "val" / wnid), wnid)
    if val:
        return {"train": (iter(train), wanted["train"]), "val": (iter(val), wanted["val"])}
    one = iter(train)
    share = len(train) * wanted["val"] // (wanted["train"] + wanted["val"])
    return {"train": (one, wanted["train"]), "val": (one, min(wanted["val"], share))}


def _shuffle(files: list[Path], wnid: str) -> list[Path]:
    return [files[i] for i in shuffled(len(files), "subset", wnid)]


def _take(files: Iterator[Path], count: int, folder: Path, record: _Record, roots: tuple[Path, Path]) -> int:
    """Write up to `count` pictures to `folder` and into the record; returns how many."""
    source, ready = roots
    folder.mkdir(parents=True)
    taken = 0
    while taken < count and (path := next(files, None)) is not None:
        origin = path.relative_to(source).as_posix()
        try:
            content = path.read_bytes()
            picture = pictures.decode(content)
        except (pictures.Unreadable, OSError) as error:
            record.unreadable[origin] = str(error)
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest in record.seen:
            record.duplicates[origin] = record.seen[digest]
            continue
        record.seen[digest] = origin
        target, entry = folder / path.name, {"from": origin, "sha256": digest}
        if picture.mode != "RGB":
            target, content = folder / f"{path.name}.png", _as_png(picture)
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "converted": f"{picture.mode} to RGB"}
        target.write_bytes(content)
        record.files[target.relative_to(ready).as_posix()] = entry
        taken += 1
    return taken


def _as_png(picture: Image) -> bytes:
    out = io.BytesIO()
    pictures.convert(picture, 3).save(out, format="PNG")
    return out.getvalue()
