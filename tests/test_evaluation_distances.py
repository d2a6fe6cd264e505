"""Distances of kept adversarial images: which count, what is said of each column, and nothing of the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from casemate.cli import app
from casemate.errors import UserError
from casemate.evaluation.distances import stored_distances
from casemate.evaluation.keys import ENGINE
from casemate.iwd import Windows, measure

SMALL = Windows(size=3)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Six images: a success and a failure of pgd, a clean error, a rejected one, two successes of flip."""
    rng = np.random.default_rng(0)
    x = (rng.random((6, 1, 8, 8)) / 2).astype(np.float32)
    x_adv = x + np.float32(0.125)
    x_adv[4:] = x[4:, :, :, ::-1]
    np.savez_compressed(
        tmp_path / "adversarial.npz", indices=np.arange(6) * 10, labels=np.zeros(6, dtype=np.int64), x_clean=x,
        x_adv=x_adv, prediction_clean=np.array([0, 0, 1, 0, 0, 0]), prediction_adv=np.array([1, 0, 1, -1, 2, 3]),
        attack=np.array(["pgd"] * 4 + ["flip"] * 2),
    )  # fmt: skip
    return tmp_path / "adversarial.npz"


def test_every_image_is_measured_and_successes_are_summed_up(kept: Path) -> None:
    found = stored_distances(kept, [SMALL])
    name = "iwd 3x3, stride 1, all windows"
    assert found.rows["success"].tolist() == [True, False, False, False, True, True]
    assert found.rows["index"].tolist() == [0, 10, 20, 30, 40, 50]
    assert found.rows[name][:4] == pytest.approx([0.125] * 4) == found.rows["linf"][:4]
    assert found.rows["l2"][0] == pytest.approx(1.0) and found.rows["mean_abs"][0] == pytest.approx(0.125)
    with np.load(kept) as file:
        x, x_adv = torch.from_numpy(file["x_clean"]), torch.from_numpy(file["x_adv"])
    assert np.array_equal(found.rows[name], measure(x, x_adv, SMALL).value)
    summary = found.summary()
    assert summary["pgd"]["n"] == 1 and summary["flip"]["n"] == 2 and list(summary) == ["flip", "pgd"]
    a, b = sorted(found.rows[name][4:])
    assert summary["flip"][name] == pytest.approx(
        {"mean": (a + b) / 2, "median": (a + b) / 2, "q25": a + (b - a) / 4, "q75": b - (b - a) / 4}
    )
    assert found.columns[name]["method"] == "exact" and found.columns[name]["count"] == 36


def test_a_sliced_column_stands_apart_with_its_error(kept: Path) -> None:
    found = stored_distances(kept, [SMALL], projections=64)
    about = found.columns["sliced 3x3, stride 1, all windows"]
    assert about["method"] == "sliced" and about["projections"] == 64 and 0 < about["relative_error"] < 0.2
    again = stored_distances(kept, [SMALL], projections=64)
    for name, values in found.rows.items():
        assert np.array_equal(values, again.rows[name])
    assert (stored_distances(kept, [SMALL], projections=2).columns)["sliced 3x3, stride 1, all windows"] != about


def test_the_floor_of_independent_windows_is_taken_off(kept: Path) -> None:
    drawn = Windows(size=3, count=12, sampling="independent")
    with np.load(kept) as file:
        x, x_adv = torch.from_numpy(file["x_clean"]), torch.from_numpy(file["x_adv"])
    measured = measure(x, x_adv, drawn)
    assert np.array_equal(stored_distances(kept, [drawn]).rows[f"iwd {drawn}"], measured.excess)
    assert (measured.excess < measured.value).all()


def test_the_file_written_holds_it_all(kept: Path, tmp_path: Path) -> None:
    found = stored_distances(kept, [SMALL], images=4)
    found.save(tmp_path / "distances.json")
    written = json.loads((tmp_path / "distances.json").read_text())
    assert written["columns"] == found.columns and written["summary"] == found.summary()
    assert written["rows"]["index"] == [0, 10, 20, 30] and written["rows"]["attack"] == ["pgd"] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adversarial.npz", "distances.json"]


def test_an_attack_without_success_has_no_figures(kept: Path) -> None:
    arrays = dict(np.load(kept))
    arrays["prediction_adv"] = np.zeros(6, dtype=np.int64)
    np.savez_compressed(kept, **arrays)
    assert stored_distances(kept, [SMALL]).summary() == {"flip": {"n": 0}, "pgd": {"n": 0}}


def test_the_command_shows_and_writes_them(kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--protocol", "digits", "--limit", "4", "--projections", "8", "--out", str(out)]
    shown = CliRunner().invoke(app, ["distances", str(kept), *options])
    assert shown.exit_code == 0 and "pgd: 1 successful" in shown.stdout and "flip" not in shown.stdout
    assert "  iwd 3x3, stride 1, all windows: 0.125 (0.125 to 0.125)\n" in shown.stdout
    assert "  sliced 3x3" in shown.stdout and len(json.loads(out.read_text())["rows"]["index"]) == 4
    wrong = CliRunner().invoke(app, ["distances", str(kept), "--protocol", "cifra"])
    assert wrong.exit_code == 2 and "did you mean 'cifar'" in wrong.stderr


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="holds no images: the evaluation kept none"):
        stored_distances(tmp_path / "empty.npz", [SMALL])
    for name in ("text.npz", "other.npz", "absent.npz"):
        with pytest.raises(UserError, match=f"{name} is not an adversarial.npz"):
            stored_distances(tmp_path / name, [SMALL])


def test_an_attack_that_measures_the_distance_depends_on_its_code() -> None:
    """The ledger follows an attack's imports only into these packages."""
    assert "casemate.iwd.exact".startswith(ENGINE)
