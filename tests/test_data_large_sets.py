"""CIFAR-100, SVHN, STL-10 and Tiny-ImageNet, from small files in their official formats."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import pickle
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import COUNTS, arrays_of, md5, small, tgz
from PIL import Image
from scipy.io import savemat

from casemate.data import cifar100, official, sources, stl10, svhn, tinyimagenet
from casemate.data.archives import BadArchive, read_tar
from casemate.data.cifar100 import CIFAR100
from casemate.data.files import FileDataset
from casemate.data.sources import Git, Local, Official, SourceFailed
from casemate.data.stl10 import STL10
from casemate.data.svhn import SVHN
from casemate.data.tinyimagenet import TinyImageNet
from casemate.data.tinyimagenet_classes import CLASSES
from casemate.errors import UserError


def like(kind: type[FileDataset], **attributes: Any) -> FileDataset:
    """A dataset like `kind` with few images."""
    made: FileDataset = type(kind.__name__, (kind,), {"counts": COUNTS, **attributes})()
    return made


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def equal(made: Any, expected: dict[str, np.ndarray]) -> None:
    assert set(made) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(made[name], array), name


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def official_folder(source: Official, address: str, folder: Path) -> Path:
    """What the official source leaves, without a process of its own."""
    folder.mkdir()
    job = {"name": source.name, "base_url": address, "overrides": source.overrides}
    official.download({**job, "url": source.url, "md5": source.md5}, folder)
    return folder


# --- CIFAR-100 ------------------------------------------------------------------------------------------------


def pickles_of_cifar100() -> dict[str, bytes]:
    arrays = arrays_of(CIFAR100)
    files = {}
    for split, n in COUNTS.items():
        rows = arrays[f"{split}_images"].transpose(0, 3, 1, 2).reshape(n, -1)
        entry = {
            "data": rows, "fine_labels": arrays[f"{split}_labels"].tolist(), "coarse_labels": [0] * n,
            "filenames": [f"{i}.png" for i in range(n)],
        }  # fmt: skip
        files[split] = pickle.dumps(entry, protocol=2)
    return files


def records_of_cifar100() -> dict[str, bytes]:
    arrays = arrays_of(CIFAR100)
    return {
        f"{split}.bin": b"".join(
            bytes([99, int(label)]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
        )
        for split in COUNTS
    }


def packed_cifar100() -> dict[str, bytes]:
    return {
        "cifar-100-python.tar.gz": tgz({f"cifar-100-python/{n}": c for n, c in pickles_of_cifar100().items()}),
        "cifar-100-binary.tar.gz": tgz({f"cifar-100-binary/{n}": c for n, c in records_of_cifar100().items()}),
    }


def small_cifar100(**attributes: Any) -> FileDataset:
    known = {
        "pickles": {name: md5(content) for name, content in pickles_of_cifar100().items()},
        "archives": {name: md5(content) for name, content in packed_cifar100().items()},
    }
    return like(CIFAR100, **(known | attributes))


@pytest.mark.parametrize("form", ["pickles", "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"])
def test_every_form_of_cifar100_decodes_to_the_same(form: str, tmp_path: Path) -> None:
    packed = packed_cifar100()
    files = pickles_of_cifar100() if form == "pickles" else {form: packed[form]}
    known = {name: md5(content) for name, content in packed.items()}  # gzip holds the time it was made at
    equal(small_cifar100(archives=known).decode(put(tmp_path, files)), arrays_of(CIFAR100))


def test_damaged_cifar100_files_say_which(tmp_path: Path) -> None:
    packed = packed_cifar100()
    name = "cifar-100-binary.tar.gz"
    put(tmp_path, {name: packed[name][:-50]})
    with pytest.raises(SourceFailed, match=r"cifar-100-binary.tar.gz .* has the wrong checksum"):
        small_cifar100().decode(tmp_path)
    short = records_of_cifar100() | {"test.bin": b"123"}
    put(tmp_path, {name: tgz({f"cifar-100-binary/{n}": c for n, c in short.items()})})
    known = {name: md5((tmp_path / name).read_bytes())}
    with pytest.raises(SourceFailed, match=r"test.bin holds 3 of 61,480 bytes: truncated"):
        small_cifar100(archives=known).decode(tmp_path)
    put(tmp_path, {name: tgz({"cifar-100-binary/../../train.bin": b"x"})})
    known = {name: md5((tmp_path / name).read_bytes())}
    with pytest.raises(SourceFailed, match="points outside the archive"):
        small_cifar100(archives=known).decode(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SourceFailed, match="none of cifar-100-python"):
        small_cifar100().decode(tmp_path)
    put(tmp_path, pickles_of_cifar100() | {"test": b"altered"})
    with pytest.raises(SourceFailed, match=r"test \(7 bytes\) has the wrong checksum"):
        small_cifar100().decode(tmp_path)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was here",)

    files = {"train": pickle.dumps(Evil()), "test": pickles_of_cifar100()["test"]}
    known = {name: md5(content) for name, content in files.items()}
    with pytest.raises(BadArchive, match="a pickle asks for"):
        small_cifar100(pickles=known).decode(put(tmp_path, files))
    assert not (tmp_path / "was here").exists()


def test_official_cifar100(served: tuple[Path, str], tmp_path: Path) -> None:
    files = pickles_of_cifar100() | {"meta": pickle.dumps({"fine_label_names": list(CIFAR100.classes)}, protocol=2)}
    archive = tgz({f"cifar-100-python/{name}": content for name, content in files.items()})
    put(served[0], {"cifar-100-python.tar.gz": archive})
    lists = {f"{split}_list": [[split, md5(files[split])]] for split in COUNTS}
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])}
    source = Official("CIFAR100", 1000, {**lists, "tgz_md5": md5(archive), "meta": meta})
    found = official_folder(source, served[1], tmp_path / "work")
    equal(small_cifar100().decode(found), arrays_of(CIFAR100))


# --- content without a published checksum ---------------------------------------------------------------------


@pytest.fixture
def cifar100_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FileDataset, Path]:
    """A small CIFAR-100, and the folder that it was fetched to."""
    put(tmp_path / "brought", pickles_of_cifar100())
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(tmp_path / "brought"))
    dataset, folder = small_cifar100(sources=(Local(),)), tmp_path / "raw" / "cifar100"
    assert dataset.fetch(folder) == "local files (CASEMATE_DATA)"
    return dataset, folder


def test_the_manifest_vouches_for_what_was_decoded(cifar100_here: tuple[FileDataset, Path]) -> None:
    dataset, folder = cifar100_here
    assert dataset.fetch(folder) == "already there"
    loaded = dataset.load(folder, "train")
    assert np.array_equal(loaded.images, arrays_of(CIFAR100)["train_images"]) and loaded.labels.dtype == np.int64
    content = bytearray((folder / "train_images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "train_images.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"train_images\.npy has the wrong checksum.*download"):
        dataset.load(folder, "train")
    assert dataset.fetch(folder) == "local files (CASEMATE_DATA)"
    dataset.load(folder, "train")


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"dataset": "cifar100"}', '{"dataset": "mnist", "arrays": {}}'])
def test_a_folder_without_its_manifest_is_not_taken_on_trust(
    manifest: str, cifar100_here: tuple[FileDataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, folder = cifar100_here
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(folder))
    assert dataset.fetch(tmp_path / "copy" / "cifar100") == "local files (CASEMATE_DATA)"
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="cannot be read"):
        dataset.load(folder, "train")
    with pytest.raises(UserError, match="cannot fetch cifar100"):
        dataset.fetch(tmp_path / "other" / "cifar100")


# --- SVHN -----------------------------------------------------------------------------------------------------


def mats_of_svhn() -> dict[str, bytes]:
    arrays, files = arrays_of(SVHN), {}
    for split, name in svhn.FILES.items():
        out = io.BytesIO()
        labels = arrays[f"{split}_labels"]
        content = {
            "X": arrays[f"{split}_images"].transpose(1, 2, 3, 0),
            "y": np.where(labels == 0, 10, labels)[:, None],
        }
        savemat(out, content, do_compression=True)
        files[name] = out.getvalue()
    return files


def small_svhn(files: dict[str, bytes]) -> FileDataset:
    return like(SVHN, files={split: md5(files[name]) for split, name in svhn.FILES.items()})


def test_svhn_decodes_with_ten_for_the_digit_zero(tmp_path: Path) -> None:
    files = mats_of_svhn()
    made = small_svhn(files).decode(put(tmp_path, files))
    equal(made, arrays_of(SVHN))
    assert 0 in made["train_labels"] and 10 not in made["train_labels"]


def test_damaged_svhn_files_say_which(tmp_path: Path) -> None:
    files = mats_of_svhn()
    with pytest.raises(SourceFailed, match=r"no train_32x32.mat there"):
        small_svhn(files).decode(tmp_path)
    cut = files | {"test_32x32.mat": files["test_32x32.mat"][:-100]}
    put(tmp_path, cut)
    with pytest.raises(SourceFailed, match=r"test_32x32.mat .* has the wrong checksum: truncated or altered"):
        small_svhn(files).decode(tmp_path)
    with pytest.raises(BadArchive, match=r"test_32x32.mat is not a readable MATLAB file"):
        small_svhn(cut).decode(tmp_path)
    odd = io.BytesIO()
    savemat(odd, {"X": np.zeros((32, 32, 3, 20), dtype=np.uint8), "y": np.full((20, 1), 11)})
    shifted = files | {"test_32x32.mat": odd.getvalue()}
    with pytest.raises(BadArchive, match=r"labels 11\.\.11"):
        small_svhn(shifted).decode(put(tmp_path, shifted))


def test_official_svhn(served: tuple[Path, str], tmp_path: Path) -> None:
    files = mats_of_svhn()
    put(served[0], files)
    listed = {split: ["http://nowhere", name, md5(files[name])] for split, name in svhn.FILES.items()}
    found = official_folder(Official("SVHN", 1000, {"split_list": listed}), served[1], tmp_path / "work")
    equal(small_svhn(files).decode(found), arrays_of(SVHN))


# --- STL-10 ---------------------------------------------------------------------------------------------------


def bins_of_stl10() -> dict[str, bytes]:
    """Written the slow way: channel by channel, column by column."""
    arrays, files = arrays_of(STL10), {}
    for split in COUNTS:
        images = arrays[f"{split}_images"]
        columns = [image[:, column, channel] for image in images for channel in range(3) for column in range(96)]
        files[f"{split}_X.bin"] = np.concatenate(columns).tobytes()
        files[f"{split}_y.bin"] = (arrays[f"{split}_labels"] + 1).tobytes()
    return files


def small_stl10() -> FileDataset:
    files = bins_of_stl10()
    return like(STL10, checksums={name: md5(files[file]) for name, file in stl10.FILES.items()})


@pytest.mark.parametrize("packed", [False, True])
def test_stl10_decodes_and_the_md5_of_its_files_is_that_of_the_arrays(packed: bool, tmp_path: Path) -> None:
    files = bins_of_stl10()
    if packed:
        inside = {f"stl10_binary/{name}": content for name, content in files.items()}
        files = {stl10.ARCHIVE: tgz({**inside, "stl10_binary/unlabeled_X.bin": b"much"})}
    dataset = small_stl10()
    arrays = dataset.decode(put(tmp_path, files))
    equal(arrays, arrays_of(STL10))
    dataset.verify(arrays)
    spoilt = {**arrays, "test_images": arrays["test_images"][:, ::-1]}
    with pytest.raises(BadArchive, match="test_images has the wrong checksum"):
        dataset.verify(spoilt)
    assert dataset.manifest(arrays)["arrays"]["test_labels"]["md5"] == dataset.checksums["test_labels"]


def test_damaged_stl10_files_say_which(tmp_path: Path) -> None:
    dataset, files = small_stl10(), bins_of_stl10()
    with pytest.raises(SourceFailed, match=r"neither stl10_binary.tar.gz nor"):
        dataset.decode(tmp_path)
    put(tmp_path, files | {"test_X.bin": files["test_X.bin"][:-1]})
    with pytest.raises(BadArchive, match=r"test_X.bin holds 552,959 of 552,960 bytes: truncated"):
        dataset.decode(tmp_path)
    put(tmp_path, files | {"test_X.bin": files["test_X.bin"] + b"x"})
    with pytest.raises(BadArchive, match=r"test_X.bin holds more than"):
        dataset.decode(tmp_path)
    for name in files:
        (tmp_path / name).unlink()
    whole = tgz({f"stl10_binary/{name}": content for name, content in files.items()})
    with pytest.raises(BadArchive, match="truncated or altered"):
        dataset.decode(put(tmp_path, {stl10.ARCHIVE: whole[: len(whole) // 2]}))
    with pytest.raises(BadArchive, match="points outside"):
        dataset.decode(put(tmp_path, {stl10.ARCHIVE: tgz({"stl10_binary/../../train_X.bin": b"x"})}))


def test_official_stl10(served: tuple[Path, str], tmp_path: Path) -> None:
    names = ("airplane", "bird")
    files = bins_of_stl10() | {
        "unlabeled_X.bin": b"", "class_names.txt": "\n".join(names).encode(), "fold_indices.txt": b"",
    }  # fmt: skip
    archive = tgz({f"stl10_binary/{name}": content for name, content in files.items()})
    put(served[0], {stl10.ARCHIVE: archive})
    lists = {
        "train_list": [[n, md5(files[n])] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")],
        "test_list": [[n, md5(files[n])] for n in ("test_X.bin", "test_y.bin")],
    }
    source = Official("STL10", 1000, {**lists, "tgz_md5": md5(archive)})
    equal(small_stl10().decode(official_folder(source, served[1], tmp_path / "work")), arrays_of(STL10))


def test_a_tar_is_read_without_being_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(tgz({"a/x.bin": b"12", "a/y.txt": b"3"}))
    assert read_tar(path, r"a/.*\.bin", limit=2) == {"x.bin": b"12"}
    with pytest.raises(BadArchive, match="more than the 1 bytes"):
        read_tar(path, r"a/.*\.bin", limit=1)
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("a/x.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(BadArchive, match="not a regular file"):
        read_tar(path, r"a/.*\.bin", limit=2)


# --- Tiny-ImageNet --------------------------------------------------------------------------------------------

TINY = {"train": 6, "test": 4}
WNIDS = list(CLASSES)[:3]


@functools.cache
def tiny_files() -> dict[str, bytes]:
    """Two training pictures in each of three classes, four of validation, two of test; one of them grey."""
    draw = np.random.default_rng(3)

    def picture(*, grey: bool = False) -> bytes:
        out = io.BytesIO()
        pixels = draw.integers(0, 256, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, format="JPEG")
        return out.getvalue()

    files = {f"train/{w}/images/{w}_{n}.JPEG": picture() for w in WNIDS for n in (2, 10)}
    files |= {f"val/images/val_{n}.JPEG": picture(grey=n == 0) for n in range(4)}
    files |= {f"test/images/test_{n}.JPEG": picture() for n in range(2)}
    lines = [f"val_{n}.JPEG\t{WNIDS[(n + 1) % 3]}\t0\t0\t9\t9\n" for n in range(4)]
    return files | {"val/val_annotations.txt": "".join(lines).encode(), "words.txt": b"not read"}


def tiny_listing(above: str = "") -> str:
    lines = []
    for path, content in tiny_files().items():
        if path.endswith("JPEG"):
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
            lines.append(f"{blob}  {above}{path}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def tiny_zip(change: dict[str, bytes] | None = None, drop: str = "") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, content in ({**tiny_files(), **(change or {})}).items():
            if path != drop:
                archive.writestr(path if path.startswith(("/", "..")) else f"tiny-imagenet-200/{path}", content)
    return out.getvalue()


def small_tiny(listing: str = "", **attributes: Any) -> FileDataset:
    known = {"counts": TINY, "unlabelled": 2, "zip_md5": "", "listing": listing or tiny_listing()}
    return like(TinyImageNet, **(known | attributes))


def expected_tiny() -> dict[str, np.ndarray]:
    def pixels(paths: list[str]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(tiny_files()[p])).convert("RGB")) for p in paths])

    return {
        "train_images": pixels([f"train/{w}/images/{w}_{n}.JPEG" for w in WNIDS for n in (2, 10)]),
        "train_labels": np.array([0, 0, 1, 1, 2, 2]),
        "test_images": pixels([f"val/images/val_{n}.JPEG" for n in range(4)]),
        "test_labels": np.array([1, 2, 0, 1]),
    }


@pytest.mark.parametrize("above", ["", "tiny-imagenet-200/"])
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_tiny_imagenet_is_known_by_its_pictures(form: str, above: str, tmp_path: Path) -> None:
    if form == "zip":
        put(tmp_path, {tinyimagenet.ARCHIVE: tiny_zip()})
    else:
        put(tmp_path / "tiny-imagenet-200", tiny_files())
    equal(small_tiny(tiny_listing(above)).decode(tmp_path), expected_tiny())
    with pytest.raises(BadArchive, match="wrong checksum"):
        small_tiny("0" * 64).decode(tmp_path)


def test_tiny_imagenet_is_known_by_the_md5_of_its_zip(tmp_path: Path) -> None:
    put(tmp_path, {tinyimagenet.ARCHIVE: tiny_zip()})
    known = md5((tmp_path / tinyimagenet.ARCHIVE).read_bytes())
    equal(small_tiny("0" * 64, zip_md5=known).decode(tmp_path), expected_tiny())


def altered() -> dict[str, bytes]:
    path = f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG"
    return {path: tiny_files()[path] + b"x"}


def large_picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (65, 64)).save(out, format="JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: tiny_zip(altered()), "the pictures have the wrong checksum"),
        (lambda: tiny_zip()[:-200], "not a readable archive"),
        (lambda: tiny_zip(drop="val/images/val_3.JPEG"), "holds 3 of 4 validation pictures"),
        (lambda: tiny_zip(drop="test/images/test_1.JPEG"), "holds 1 of 2 test pictures"),
        (lambda: tiny_zip(drop="val/val_annotations.txt"), r"holds no val_annotations\.txt"),
        (
            lambda: tiny_zip({"val/val_annotations.txt": b"val_0.JPEG\tn00000000\n"}),
            "val_0.JPEG is of no known class",
        ),
        (lambda: tiny_zip({"train/n99999999/images/n99999999_0.JPEG": b""}), "of no known class"),
        (lambda: tiny_zip({"../val_0.JPEG": b""}), "points outside the archive"),
        (lambda: tiny_zip({"/etc/passwd": b""}), "points outside the archive"),
        (lambda: tiny_zip({"other/val_0.JPEG": b""}), "two files named"),
        (lambda: tiny_zip({"test/images/test_0.JPEG": bytes(1_000_001)}), "more than 1,000,000"),
        (lambda: tiny_zip({"val/images/val_0.JPEG": b"no picture"}), "val_0.JPEG is not a picture"),
        (lambda: tiny_zip({"val/images/val_0.JPEG": large_picture()}), "has 65x64 pixels"),
    ],
)
def test_damaged_tiny_imagenet_says_why(made: Callable[[], bytes], why: str, tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match=why):
        small_tiny().decode(put(tmp_path, {tinyimagenet.ARCHIVE: made()}))


def test_a_flipped_bit_in_the_zip_is_found_by_its_crc(tmp_path: Path) -> None:
    content = bytearray(tiny_zip())
    content[content.index(b"val_annotations.txt") + 30] ^= 1
    with pytest.raises(BadArchive, match="truncated or altered"):
        small_tiny().decode(put(tmp_path, {tinyimagenet.ARCHIVE: bytes(content)}))


def test_no_tiny_imagenet_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match=r"neither tiny-imagenet-200.zip nor an unpacked"):
        small_tiny().decode(tmp_path)


def test_official_tiny_imagenet(served: tuple[Path, str], tmp_path: Path) -> None:
    put(served[0], {tinyimagenet.ARCHIVE: tiny_zip()})
    right = md5((served[0] / tinyimagenet.ARCHIVE).read_bytes())
    source = Official(tinyimagenet.ARCHIVE, 1000, url="http://nowhere/", md5=right)
    assert source.label == "official source (tiny-imagenet-200.zip)"
    equal(small_tiny().decode(official_folder(source, served[1], tmp_path / "work")), expected_tiny())
    with pytest.raises(RuntimeError, match="corrupted"):
        official_folder(
            Official(tinyimagenet.ARCHIVE, 1000, url="http://nowhere/", md5="0"), served[1], tmp_path / "2"
        )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """A repository on this disk that holds the small Tiny-ImageNet."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "x")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "x@example.org")
    here = tmp_path / "owner" / "name"
    put(here / "tiny-imagenet-200", tiny_files())
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=here, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, check=True, capture_output=True, text=True
    ).stdout.strip()
    return Git(
        "owner/name", commit, "tiny-imagenet-200", tinyimagenet.MIRROR.members, 1000, 1_000_000, f"file://{tmp_path}/"
    )


def test_a_repository_at_a_commit_is_a_source(repository: Git, tmp_path: Path) -> None:
    dataset = small_tiny(sources=(repository,))
    assert dataset.fetch(tmp_path / "raw" / "tiny") == repository.label == f"git owner/name {repository.commit[:7]}"
    made = dataset.load(tmp_path / "raw" / "tiny", "test")
    assert np.array_equal(made.images, expected_tiny()["test_images"]) and made.labels.tolist() == [1, 2, 0, 1]
    manifest = json.loads((tmp_path / "raw" / "tiny" / "manifest.json").read_text())
    assert len(manifest["arrays"]["train_images"]["sha256"]) == 64


def test_a_repository_without_the_commit_or_git_itself_is_one_more_reason(
    repository: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Git(**{**vars(repository), "commit": "0" * 40})
    with pytest.raises(UserError, match=r"git owner/name 0000000: .*0000000"):
        small_tiny(sources=(wrong,)).fetch(tmp_path / "raw" / "tiny")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git is not installed"):
        small_tiny(sources=(repository,)).fetch(tmp_path / "raw" / "tiny")


def test_the_members_wanted_of_the_mirror_are_what_is_read() -> None:
    import re

    wanted = [p for p in tiny_files() if re.fullmatch(tinyimagenet.MIRROR.members, f"tiny-imagenet-200/{p}")]
    assert set(tiny_files()) - set(wanted) == {"words.txt"}
    assert len(CLASSES) == 200 and list(CLASSES) == sorted(CLASSES)


def test_cifar100_names_stand_in_alphabetical_order() -> None:
    assert len(CIFAR100.classes) == 100 and list(CIFAR100.classes) == sorted(CIFAR100.classes)
    assert cifar100.RECORD == 3074 and small(CIFAR100).checksums != CIFAR100.checksums == {}
