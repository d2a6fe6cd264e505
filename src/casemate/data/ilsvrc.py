"""Where ImageNet's pictures are: folders in its layout or the official archives, read in place and never unpacked."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from casemate.data import pictures
from casemate.data.archives import TORN, BadArchive, find, inside, read_tar, torn
from casemate.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
LISTS = ("val_map.txt", "LOC_val_solution.csv", "valprep.sh", "imagenet_2012_validation_synset_labels.txt")
"""Text files with the classes of the validation pictures: lines of a name and a WordNet id, or of ids in order."""
NAMED = re.compile(r"(ILSVRC2012_val_\d{8})(?:\.JPEG)?[\s,;:]+(n\d{8})\b")
LARGEST = 100_000_000  # bytes of one picture; the largest of ImageNet has 15 million


class Picture(NamedTuple):
    """One file, not read yet. `read` raises OSError or `pictures.Unreadable`."""

    name: str
    origin: str
    """Relative to the source, through archives."""
    read: Callable[[], bytes]


class Source:
    """The pictures at `root`, by split and WordNet id; archives stay open until it is closed.

    Training pictures are looked for in train/WNID, WNID, train/WNID.tar, WNID.tar and ILSVRC2012_img_train.tar, a
    tar of one tar a class; validation pictures in val/WNID and, by name, in val and ILSVRC2012_img_val.tar, for which
    their classes must be told: by the devkit (packed or not) or by one of LISTS. Compressed archives are refused, as
    they can only be read from their beginning.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open = ExitStack()
        self._archives: dict[Path, Members] = {}
        self._classes: Mapping[str, str] | None = None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def pictures(self, split: str, wnid: str) -> list[Picture]:
        """Those of a class in `train` or `val`, by name; empty if there are none. Raises UserError on an archive that
        cannot be read, and on validation pictures whose classes nothing tells."""
        folders = [self.root / split / wnid] + [self.root / wnid] * (split == "train")
        for folder in folders:
            files = pictures.picture_files(folder) if folder.is_dir() else []
            if files:
                return [Picture(p.name, p.relative_to(self.root).as_posix(), p.read_bytes) for p in files]
        return self._train(wnid) if split == "train" else self._val(wnid)

    def _train(self, wnid: str) -> list[Picture]:
        for path in (self.root / "train" / f"{wnid}.tar", self.root / f"{wnid}.tar"):
            if path.is_file():
                return self._members(path).pictures(path.relative_to(self.root).as_posix())
        if not (self.root / TRAIN).is_file():
            return []
        outer = self._members(self.root / TRAIN)
        if f"{wnid}.tar" not in outer.found:
            return []
        try:
            return self._entered(outer.stream(f"{wnid}.tar")).pictures(f"{TRAIN}/{wnid}.tar")
        except BadArchive as error:
            raise UserError(f"{wnid}.tar in {self.root / TRAIN} {error}") from None

    def _val(self, wnid: str) -> list[Picture]:
        flat, archive = self.root / "val", self.root / VAL
        found: list[Picture] = []
        if flat.is_dir():
            files = pictures.picture_files(flat)
            found = [Picture(p.name, p.relative_to(self.root).as_posix(), p.read_bytes) for p in files]
        if not found and archive.is_file():
            found = self._members(archive).pictures(VAL)
        return [p for p in found if self.classes.get(p.name.partition(".")[0]) == wnid] if found else []

    @property
    def classes(self) -> Mapping[str, str]:
        """Name without its suffix -> WordNet id, of the validation pictures."""
        if self._classes is None:
            try:
                self._classes = validation_classes(self.root)
            except BadArchive as error:
                raise UserError(f"the classes of the validation pictures in {self.root}: {error}") from None
        return self._classes

    def _members(self, path: Path) -> Members:
        if path not in self._archives:
            try:
                self._archives[path] = self._entered(self._open.enter_context(path.open("rb")))
            except BadArchive as error:
                raise UserError(f"{path} {error}") from None
        return self._archives[path]

    def _entered(self, stream: IO[bytes]) -> Members:
        try:
            return Members(self._open.enter_context(tarfile.open(fileobj=stream, mode="r:")))
        except TORN as error:
            raise torn(error) from None


class Members:
    """The regular files of a tar by name, from its headers alone. Raises BadArchive if it is damaged or lies."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self.archive = archive
        self.found: dict[str, tarfile.TarInfo] = {}
        try:
            for member in archive:
                name = inside(member.name).name
                if member.isreg() and name in self.found:
                    raise BadArchive(f"holds two files named {name!r}")
                if member.isreg():
                    self.found[name] = member
        except TORN as error:
            raise torn(error) from None

    def stream(self, name: str) -> IO[bytes]:
        """A member, to be read at any place."""
        stream = self.archive.extractfile(self.found[name])
        assert stream is not None  # a regular member always has content
        return stream

    def pictures(self, origin: str) -> list[Picture]:
        """Those by suffix, sorted by name."""
        names = sorted(name for name in self.found if Path(name).suffix.lower() in pictures.SUFFIXES)
        return [Picture(name, f"{origin}/{name}", self._reader(name)) for name in names]

    def _reader(self, name: str) -> Callable[[], bytes]:
        def read() -> bytes:
            if self.found[name].size > LARGEST:
                raise pictures.Unreadable(f"has {self.found[name].size:,} bytes, more than {LARGEST:,}")
            return self.stream(name).read()

        return read


def validation_classes(root: Path) -> dict[str, str]:
    """The classes of the validation pictures from what is below `root`; see `Source`. BadArchive if nothing tells."""
    there = {name: paths[0] for name, paths in find(root, (DEVKIT, META, TRUTH, *LISTS), depth=2).items() if paths}
    for name in LISTS:
        if name in there:
            return _listed(there[name])
    if META in there and TRUTH in there:
        return _devkit(there[META].read_bytes(), there[TRUTH].read_text())
    if DEVKIT in there:
        wanted = rf".*/({re.escape(META)}|{re.escape(TRUTH)})"
        files = read_tar(there[DEVKIT], wanted, limit=10_000_000)
        if set(files) != {META, TRUTH}:
            raise BadArchive(f"{DEVKIT} holds no {META} and {TRUTH}")
        return _devkit(files[META], files[TRUTH].decode("ascii", "replace"))
    raise BadArchive(f"nothing tells them; put {DEVKIT} there, or one of {', '.join(LISTS)}")


def _listed(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    named = dict(_names(lines))
    if named:
        return named
    if not lines or not all(re.fullmatch(r"n\d{8}", line.strip()) for line in lines):
        raise BadArchive(f"{path.name} has no line like 'ILSVRC2012_val_00000001.JPEG n01751748'")
    return {_name(number): line.strip() for number, line in enumerate(lines, start=1)}


def _names(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        match = NAMED.search(line)
        if match:
            yield match[1], match[2]


def _name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def _devkit(meta: bytes, truth: str) -> dict[str, str]:
    """meta.mat numbers the synsets, those above the classes too; the other file has a number for each picture."""
    import io

    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {_name(number): wnid[int(label)] for number, label in enumerate(truth.split(), start=1)}
    except (KeyError, IndexError, ValueError, TypeError, NotImplementedError) as error:
        raise BadArchive(f"{META} and {TRUTH} do not fit each other ({error})") from None
