"""The 10-class ImageNet subset, from folders or archives (see `ilsvrc`): every picture decoded before it is taken."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from casemate.data import pictures, store
from casemate.data.ilsvrc import Picture, Source
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


SPLITS = ("val", "train")
"""In the order they take their pictures."""


class Chosen(NamedTuple):
    """A picture that was taken: decoded, and as it was."""

    split: str
    wnid: str
    source: Picture
    picture: Image
    content: bytes
    digest: str


@dataclass
class Choice:
    """So many pictures of each class as were asked for, and what happened on the way; filled by `pictures`."""

    wnids: Sequence[str]
    wanted: Mapping[str, int]
    """Of each split and class."""
    allow_missing: bool = False
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, str] = field(default_factory=dict)

    def pictures(self, source: Source) -> Iterator[Chosen]:
        """Each class shuffled by a hash of its name. Without validation pictures, a class is cut in the proportion
        asked for. Unreadable pictures and second copies are left out, and the next one takes their place.

        Raises UserError, naming them, on classes without training pictures, unless they are allowed to be missing
        and not all of them are.
        """
        found = {w: {split: source.pictures(split, w) for split in SPLITS} for w in self.wnids}
        self.missing = [w for w in self.wnids if not found[w]["train"]]
        if self.missing and (not self.allow_missing or len(self.missing) == len(self.wnids)):
            raise UserError(
                f"{source.root} has no training pictures of {', '.join(map(_named, self.missing))}; expected in it "
                "WNID/* or train/WNID/* and val/WNID/*, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
            )
        for wnid in self.wnids:
            pools = self._pools(found[wnid], wnid)
            self.counts[wnid] = dict.fromkeys(SPLITS, 0)
            for split in SPLITS:
                for chosen in self._take(*pools[split], split, wnid):
                    self.counts[wnid][split] += 1
                    yield chosen

    @property
    def short(self) -> dict[str, dict[str, dict[str, int]]]:
        """The classes that have fewer pictures than were asked for: `taken` of `wanted` by class and split."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for wnid, counts in self.counts.items():
            for split, taken in counts.items():
                if taken != self.wanted[split]:
                    found.setdefault(wnid, {})[split] = {"taken": taken, "wanted": self.wanted[split]}
        return found

    def _pools(self, found: Mapping[str, list[Picture]], wnid: str) -> dict[str, tuple[Iterator[Picture], int]]:
        """For each split, the pictures to take from, in order, and how many to take; shared if there is no val."""
        train, val = (_shuffle(found[split], wnid) for split in ("train", "val"))
        if val:
            return {"train": (iter(train), self.wanted["train"]), "val": (iter(val), self.wanted["val"])}
        one = iter(train)
        share = len(train) * self.wanted["val"] // (self.wanted["train"] + self.wanted["val"])
        return {"train": (one, self.wanted["train"]), "val": (one, min(self.wanted["val"], share))}

    def _take(self, pool: Iterator[Picture], count: int, split: str, wnid: str) -> Iterator[Chosen]:
        taken = 0
        while taken < count and (source := next(pool, None)) is not None:
            try:
                content = source.read()
                picture = pictures.decode(content)
            except (pictures.Unreadable, OSError) as error:
                self.unreadable[source.origin] = str(error)
                continue
            digest = hashlib.sha256(content).hexdigest()
            if digest in self._seen:
                self.duplicates[source.origin] = self._seen[digest]
                continue
            self._seen[digest] = source.origin
            taken += 1
            yield Chosen(split, wnid, source, picture, content, digest)


def build_subset(
    source: Path,
    out: Path,
    wnids: Sequence[str] = tuple(IMAGENET10),
    per_class_train: int = 1300,
    per_class_val: int = 50,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Write `out/{train,val}/WNID/*` and `out/manifest.json`, and return the manifest.

    `source` holds WNID/* or {train,val}/WNID/*, or the official archives; see `ilsvrc.Source` and `Choice.pictures`.
    RGB files are copied byte for byte; grey, CMYK, palette and transparent ones are written as RGB PNG. The manifest
    has the sha256 and origin of every file, what was left out and why, and the counts that are not what was asked
    for. Raises UserError on missing classes unless `allow_missing`.
    """
    _check(source, out, wnids, per_class_train, per_class_val)
    choice = Choice(wnids, {"train": per_class_train, "val": per_class_val}, allow_missing)
    files: dict[str, dict[str, Any]] = {}
    with store.disk_errors(out), store.exclusive(out) as staging, Source(source) as opened:
        ready = staging / "ready"
        for split in SPLITS:
            for wnid in wnids:
                (ready / split / wnid).mkdir(parents=True)
        for chosen in choice.pictures(opened):
            target, entry = _write(chosen, ready)
            files[target.relative_to(ready).as_posix()] = entry
        manifest = {
            "schema": 1,
            "wnids": list(wnids),
            "classes": {w: IMAGENET10.get(w, w) for w in wnids},
            "counts": choice.counts,
            "short": choice.short,
            "missing": choice.missing,
            "files": files,
            "unreadable": choice.unreadable,
            "duplicates": choice.duplicates,
        }
        store.write_manifest(ready, manifest)
        store.put_in_place(ready, out, staging)
    return manifest


def summary(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What of a manifest a person should know: a line each."""
    converted = sum("converted" in entry for entry in manifest["files"].values())
    yield (
        f"{len(manifest['files']):,} pictures of {len(manifest['wnids'])} classes; {converted:,} converted to RGB, "
        f"{len(manifest['unreadable']):,} unreadable and {len(manifest['duplicates']):,} copies left out"
    )
    for wnid, splits in manifest["short"].items():
        counts = ", ".join(f"{n['taken']:,} of {n['wanted']:,} {split}" for split, n in sorted(splits.items()))
        yield f"{_named(wnid)}: {counts}"


def _named(wnid: str) -> str:
    return f"{wnid} ({IMAGENET10[wnid]})" if wnid in IMAGENET10 else wnid


def _check(source: Path, out: Path, wnids: Sequence[str], train: int, val: int) -> None:
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder; give one in ImageNet's layout (WNID/*, train/WNID/*) or its archives"
        )
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} overlaps {source}; write the subset somewhere else")
    wrong = [w for w in wnids if not re.fullmatch(r"n\d{8}", w)]
    if wrong or len(set(wnids)) != len(wnids) or not wnids:
        got = ", ".join(wrong or wnids) or "none"
        raise UserError(f"WordNet ids look like n02793495, each given once; got {got}")
    if train < 1 or val < 0:
        raise UserError(f"per_class_train {train} must be 1 or more and per_class_val {val} 0 or more")


def _shuffle(found: list[Picture], wnid: str) -> list[Picture]:
    return [found[i] for i in shuffled(len(found), "subset", wnid)]


def _write(chosen: Chosen, ready: Path) -> tuple[Path, dict[str, Any]]:
    """The file written, and its line of the manifest."""
    folder, name, content = ready / chosen.split / chosen.wnid, chosen.source.name, chosen.content
    target, entry = folder / name, {"from": chosen.source.origin, "sha256": chosen.digest}
    if chosen.picture.mode != "RGB":
        target, content = folder / f"{name}.png", _as_png(chosen.picture)
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "converted": f"{chosen.picture.mode} to RGB"}
    target.write_bytes(content)
    return target, entry


def _as_png(picture: Image) -> bytes:
    out = io.BytesIO()
    pictures.convert(picture, 3).save(out, format="PNG")
    return out.getvalue()
