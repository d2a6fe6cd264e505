"""The GPU's list of work, rehearsed on the CPU with networks and data of no size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import carried, on_gpu
from benchmarks.gpu_items import VARIANTS
from casemate.errors import UserError

SMALL = 60


def batches(folder: Path, names: tuple[str, ...], records: int = SMALL) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        draw = np.random.default_rng(number)
        rows = draw.integers(0, 256, (records, carried.RECORD), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)


def slice_of(
    tmp_path: Path, out: str, *more: str, only: tuple[str, ...] = ("card", "train-fgsm_rs", "score-fgsm_rs")
) -> int:
    given = ["--device", "cpu", "--tiny", "--store", str(tmp_path / "store"), "--out", str(tmp_path / out)]
    return on_gpu.main([*given, "--only", *only, *more])


def test_a_slice_measures_trains_scores_and_the_next_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches(tmp_path / "here" / "deep", ("data_batch_1.bin", "data_batch_2.bin"))
    assert slice_of(tmp_path, "first", "--budget", "300", "--carried", str(tmp_path / "here")) == 0
    said = capsys.readouterr().out
    assert "train-fgsm_rs               needs data" in said, "the test batch is not there yet"
    ceilings = json.loads((tmp_path / "first" / "card.json").read_text())
    assert ceilings["bf16_tflops"] > 0 and ceilings["copy_gb_s"] > 0 and ceilings["conditions"]["torch"]

    batches(tmp_path / "there", ("test_batch.bin",))
    more = ("--carried", str(tmp_path / "there"), "--done", str(tmp_path / "first"))
    assert slice_of(tmp_path, "second", "--budget", "300", *more) == 0
    said = capsys.readouterr().out
    assert "card                        done before" in said
    trained = json.loads((tmp_path / "second" / "train-fgsm_rs.json").read_text())
    assert trained["n_train"] == 2 * SMALL and not trained["whole_data"] and trained["training_s"] > 0
    score = json.loads((tmp_path / "second" / "score-fgsm_rs.json").read_text())
    assert score["complete"] and score["n"] == 20 and len(score["chunks"]) == 2
    assert score["low"] <= score["autoattack"] <= score["high"] and score["autoattack"] <= score["clean"]
    assert not list((tmp_path / "second").glob("*.safetensors")), "what is scored need not be carried"


def test_scoring_goes_on_where_it_was_with_the_weights_that_were_brought(tmp_path: Path) -> None:
    batches(tmp_path / "store", ("data_batch_1.bin", "test_batch.bin"))
    assert slice_of(tmp_path, "whole", "--budget", "300", "--keep") == 0
    whole = json.loads((tmp_path / "whole" / "score-fgsm_rs.json").read_text())
    brought = tmp_path / "brought"
    brought.mkdir()
    for path in (tmp_path / "whole").iterdir():
        (brought / path.name).write_bytes(path.read_bytes())
    first = {**whole, "chunks": whole["chunks"][:1], "complete": False}
    (brought / "score-fgsm_rs.json").write_text(json.dumps(first))
    assert slice_of(tmp_path, "again", "--budget", "300", "--done", str(brought)) == 0
    again = json.loads((tmp_path / "again" / "score-fgsm_rs.json").read_text())
    assert again["chunks"] == whole["chunks"]
    (brought / "score-fgsm_rs.json").unlink()
    for path in brought.glob("*.safetensors"):
        path.unlink()
    assert slice_of(tmp_path, "lost", "--budget", "300", "--done", str(brought)) == 0
    assert "did not come along" in (tmp_path / "lost" / "score-fgsm_rs.error.txt").read_text()


def test_every_variant_of_the_step_is_measured_and_compared(tmp_path: Path) -> None:
    assert slice_of(tmp_path, "out", "--budget", "300", only=("card", "parity", "rate-main-at_pgd")) == 0
    found = json.loads((tmp_path / "out" / "rate-main-at_pgd.json").read_text())
    assert [row["variant"] for row in found["rows"]] == list(VARIANTS) and found["usual"]["step_ms"] > 0
    assert all(row["step_ms"] > 0 and row["tflops"] > 0 for row in found["rows"])
    assert "there is no GPU here" in found["rows"][2]["said"] and not found["rows"][1]["said"]
    apart = json.loads((tmp_path / "out" / "parity.json").read_text())["variants"]
    assert apart["float32"]["apart"] == 0 < apart["bf16"]["apart"] < 0.05
    assert apart["bf16_graph_host"]["apart"] == apart["bf16"]["apart"], "without a GPU a graph changes nothing"


def test_nothing_is_begun_that_would_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slice_of(tmp_path, "out", "--budget", "5", only=("card",)) == 0
    assert "next slice: needs about 8 s" in capsys.readouterr().out and not (tmp_path / "out" / "card.json").exists()


def test_an_item_is_cut_off_when_the_slice_ends(tmp_path: Path) -> None:
    import time

    def long(_: on_gpu.Slice) -> dict[str, object]:
        time.sleep(30)
        return {}

    slice_ = on_gpu.Slice("cpu", tmp_path, [], tmp_path, time.monotonic() + 0.3, tiny=True)
    items = [on_gpu.Item("long", long, lambda _: 0.1), on_gpu.Item("next", long, lambda _: 0.1)]
    assert on_gpu.work_down(items, slice_) == {"long": "cut off by the end of the slice"}


def test_a_failing_item_does_not_take_the_others_along(tmp_path: Path) -> None:
    import time

    def fails(_: on_gpu.Slice) -> dict[str, object]:
        raise RuntimeError("no kernel image")

    slice_ = on_gpu.Slice("cpu", tmp_path, [], tmp_path, time.monotonic() + 60, tiny=True)
    items = [
        on_gpu.Item("bad", fails, lambda _: 1), on_gpu.Item("after", lambda _: {}, lambda _: 1, ("bad",)),
        on_gpu.Item("good", lambda _: {"found": 1}, lambda _: 1),
    ]  # fmt: skip
    told = on_gpu.work_down(items, slice_)
    assert told == {"bad": "failed: no kernel image", "after": "waits for bad", "good": "done"}
    assert json.loads((tmp_path / "good.json").read_text())["found"] == 1


def test_a_batch_that_is_cut_short_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches(tmp_path / "here", ("data_batch_1.bin",))
    path = tmp_path / "here" / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-5])
    assert slice_of(tmp_path, "out", "--carried", str(tmp_path / "here")) == 2
    said = capsys.readouterr().err
    assert "data_batch_1.bin has 184,375 of 184,380 bytes: cut short" in said and not list(
        (tmp_path / "store").iterdir()
    )


def test_what_is_no_batch_is_named(tmp_path: Path) -> None:
    batches(tmp_path, ("test_batch.bin",))
    rows = np.fromfile(tmp_path / "test_batch.bin", np.uint8)
    rows[0] = 10
    rows.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(UserError, match="a label above 9"):
        carried.collect([tmp_path], tmp_path / "store", SMALL)


def test_images_come_back_as_they_were_written(tmp_path: Path) -> None:
    batches(tmp_path, ("data_batch_1.bin", "test_batch.bin"))
    train, _, whole = carried.load(tmp_path, SMALL)
    raw = np.fromfile(tmp_path / "data_batch_1.bin", np.uint8).reshape(SMALL, -1)
    assert train.images.shape == (SMALL, 32, 32, 3) and not whole
    assert train.images[3, 5, 7, 2] == raw[3, 1 + 2 * 1024 + 5 * 32 + 7] and train.labels[3] == raw[3, 0]


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(on_gpu.NEEDED, "no_such_module", "no-such-package")
    assert on_gpu.missing().startswith("missing here: no-such-package. Carry them: 'pip download")
    assert "\n" not in on_gpu.missing()


ONLY = """
import sys, sysconfig
from pathlib import Path
sys.path[:0] = ["src", "."]
folder = Path(sysconfig.get_paths()["purelib"])
here = {path.name.split(".")[0] for path in folder.iterdir()}

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in here - set(sys.argv[1:]) and "." not in name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
import benchmarks.gpu_items as items, benchmarks.carried, benchmarks.on_gpu
import casemate.attacks.autoattack, casemate.attacks.reduced, casemate.data.device
import casemate.evaluation.robustness, casemate.training.loop, safetensors.torch
from casemate import registry
for name in items.DEFENSES:
    registry.resolve("defense", name)
for name in ("preact_resnet18", "resnet18", "wrn"):
    registry.resolve("network", name)
"""


def test_training_and_evaluation_need_no_other_package() -> None:
    """With everything else out of reach, all that a slice uses can be imported."""
    brought = {word.replace("-", "_") for packages in on_gpu.NEEDED.values() for word in packages.split()}
    torchs_own = {"sympy", "mpmath", "networkx", "filelock", "jinja2", "markupsafe", "fsspec", "triton", "torchgen"}
    root = Path(on_gpu.__file__).resolve().parent.parent
    allowed = [*(brought | torchs_own | set(on_gpu.NEEDED)), "functorch", "_distutils_hack", "nvidia"]
    done = subprocess.run([sys.executable, "-c", ONLY, *allowed], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
