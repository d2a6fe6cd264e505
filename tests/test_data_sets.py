"""The datasets themselves, their canonical folders, and what can happen to those."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from casemate.data import Loaded, build_dataset, fetch_dataset, load_dataset, store
from casemate.data.digits import Digits
from casemate.data.sources import Local
from casemate.data.splits import shuffled
from casemate.errors import UserError
from casemate.registry import names, schema

HERE = Path(__file__).parents[1] / "data" / "raw"


def test_digits_are_the_bundled_ones(digits: Loaded) -> None:
    dataset, train, test = digits
    assert train.images.shape == (1297, 8, 8, 1) and test.images.shape == (500, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert np.bincount(test.labels).min() >= 49 and np.bincount(test.labels).max() <= 51
    from sklearn.datasets import load_digits

    bundle = load_digits()
    expected = [[round(v * 255 / 16) for v in row] for row in bundle.data]  # python's round: half to even
    ours = [*train.images.reshape(-1, 64).tolist(), *test.images.reshape(-1, 64).tolist()]
    assert sorted(ours) == sorted(expected)
    values = train.images / 255
    assert dataset.mean == (pytest.approx(values.mean(), abs=1e-4),)
    assert dataset.std == (pytest.approx(values.std(), abs=1e-4),)


@pytest.mark.parametrize("name", names("dataset"))
def test_every_dataset_states_what_it_is(name: str) -> None:
    dataset = build_dataset(name)
    channels = dataset.input_shape[0]
    assert len(dataset.mean) == len(dataset.std) == channels
    assert len(set(dataset.classes)) == len(dataset.classes)
    assert schema("dataset", name)() is not None


def published(name: str) -> bool:
    """Whether its content is the same for everybody: not what a user brings."""
    return any(not isinstance(source, Local) for source in build_dataset(name).sources)  # type: ignore[attr-defined]


FETCHED = {
    "digits", *(n for n in names("dataset") if published(n) and (HERE / n / "manifest.json").is_file()),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FETCHED))
def test_downloaded_content_is_canonical(name: str, raw: Path) -> None:
    root = HERE if (HERE / name / "manifest.json").is_file() else raw
    dataset, train, test = load_dataset(name, root)  # verifies shapes and checksums
    assert set(np.unique(train.labels)) == set(np.unique(test.labels)) == set(range(len(dataset.classes)))
    levels = np.arange(256) / 255
    sample = shuffled(len(train), "a sample")[:5000]
    for channel, (mean, std) in enumerate(zip(dataset.mean, dataset.std, strict=True)):
        some = train.images[sample][..., channel]
        share = np.bincount(some.ravel(), minlength=256) / some.size
        assert share @ levels == pytest.approx(mean, abs=5e-3)
        assert np.sqrt(share @ (levels - mean) ** 2) == pytest.approx(std, abs=5e-3)


def test_an_unknown_dataset_is_named_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dataset 'minst'; did you mean 'mnist'"):
        fetch_dataset("minst", tmp_path)


@pytest.fixture
def own(raw: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may spoil."""
    return Path(shutil.copytree(raw / "digits", tmp_path / "digits"))


def test_fetching_again_does_nothing_and_the_same_bytes_come_back(own: Path, raw: Path) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in own.iterdir()}
    assert Digits().fetch(own) == "already there"
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in own.iterdir()} == before
    (own / "test_labels.npy").unlink()
    assert Digits().fetch(own) == "scikit-learn (bundled)"
    assert {p.name: p.read_bytes() for p in own.iterdir()} == {n: b for n, (_, b) in before.items()}
    manifest = json.loads((own / "manifest.json").read_text())
    assert manifest["arrays"]["test_images"]["shape"] == [500, 8, 8, 1]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_spoilt_files_are_errors_that_name_them_and_the_mend(own: Path) -> None:
    dataset = Digits()
    flip_a_bit(own / "test_images.npy")
    with pytest.raises(UserError, match=r"test_images\.npy has the wrong checksum.*download"):
        dataset.load(own, "test")
    dataset.load(own, "train")
    (own / "train_labels.npy").write_bytes((own / "train_labels.npy").read_bytes()[:200])
    with pytest.raises(UserError, match=r"train_labels\.npy cannot be read"):
        dataset.load(own, "train")
    np.save(own / "train_labels.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match=r"has shape \(3,\), not \(1297,\)"):
        dataset.load(own, "train")
    (own / "train_images.npy").unlink()
    with pytest.raises(UserError, match=r"digits is not in .*train_images\.npy is missing.*download"):
        dataset.load(own, "train")
    assert dataset.fetch(own) == "scikit-learn (bundled)"
    dataset.load(own, "train")


def test_labels_that_are_not_bytes_do_not_fit_by_wrapping_around(own: Path) -> None:
    labels = np.load(own / "test_labels.npy")
    np.save(own / "test_labels.npy", labels + 256)
    with pytest.raises(UserError, match="values outside"):
        Digits().load(own, "test")


def test_pickled_arrays_are_not_read(own: Path) -> None:
    np.save(own / "test_labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        Digits().load(own, "test")


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        Digits().fetch(folder)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_leftovers_of_a_killed_fetch_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".digits.12345.partial"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    Digits().fetch(tmp_path / "digits")
    assert not left.exists()


def test_too_little_disk_space_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    class Huge(Digits):
        space = 10**18

    with pytest.raises(UserError, match=r"needs 1,000,000,000,000 MB of free disk space and has"):
        Huge().fetch(tmp_path / "digits")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_an_error_a_user_can_mend(tmp_path: Path) -> None:
    why = r"no space left while writing .*digits"
    with pytest.raises(UserError, match=why), store.disk_errors(tmp_path / "digits"):
        Path("/dev/full").write_bytes(bytes(100_000))


def test_other_system_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="strange"), store.disk_errors(tmp_path):
        raise OSError(errno.EIO, "strange")


def test_a_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Digits().fetch(tmp_path / "raw" / "digits")


def _fetch(folder: Path, said: multiprocessing.Queue[str]) -> None:
    said.put(Digits().fetch(folder))


def test_two_fetches_at_once_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    said: multiprocessing.Queue[str] = context.Queue()
    pair = [context.Process(target=_fetch, args=(tmp_path / "digits", said)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(30)
    told = {said.get(timeout=5), said.get(timeout=5)}
    assert "scikit-learn (bundled)" in told and told & {"another process, meanwhile", "already there"}
    Digits().load(tmp_path / "digits", "train")


def test_sources_and_datasets_need_no_torch() -> None:
    modules = "sources, store, files, archives, mnist, cifar10, digits, splits, folder, subset, pictures"
    modules += ", cifar100, svhn, stl10, tinyimagenet"
    code = f"import sys; from casemate.data import {modules}; print('torch' in sys.modules, 'PIL' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]
