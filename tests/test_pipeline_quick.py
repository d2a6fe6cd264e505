"""The `quick` profile for real, by DVC, in a copy of the project: results, lineage, clones, experiments."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from casemate.deploy.card import verify
from tests.project import Project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("quick"), "quick")
    project.dvc("repro")
    return project


def test_quick_runs_from_data_to_report(quick: Project) -> None:
    board = quick.json("reports/quick/leaderboard.json")
    rows = {row["system"]: row for row in board["rows"]}
    assert {"standard", "at_pgd", "atld", "atld+limited", "atld+off"} == set(rows)
    assert rows["standard"]["clean"] > 0.93 and rows["standard"]["worst_core"] < 0.2
    assert rows["at_pgd"]["clean"] > 0.9 and rows["at_pgd"]["worst_core"] > rows["standard"]["worst_core"] + 0.3
    assert rows["at_pgd"]["clean_n"] == rows["at_pgd"]["worst_core_n"] == 500
    assert all(row["worst_all"] <= row["worst_core"] + 0.1 for row in rows.values())
    assert "<html" in (quick.folder / "reports/quick/index.html").read_text()
    assert "quick" in (quick.folder / "reports/index.html").read_text()


def test_both_engines_say_nothing_to_do(quick: Project) -> None:
    quick.assert_nothing_to_do()
    again = quick.dvc("repro")
    assert "Running stage" not in again.stdout


def test_nothing_is_left_for_git_that_should_not_be(quick: Project) -> None:
    shown = quick.run("git", "status", "--porcelain", "--untracked-files=all").stdout
    kept = re.compile(r"(dvc\.lock|reports/.*|models/quick/champion/.*|data/\.gitignore|data/raw/\.gitignore)$")
    stray = [line for line in shown.splitlines() if not kept.search(line)]
    assert not stray, stray


def test_outputs_hold_no_time_run_or_machine(quick: Project) -> None:
    for path in [*quick.folder.glob("reports/quick/**/*.*"), *quick.folder.glob("models/quick/**/*.*")]:
        content = path.read_bytes()
        assert str(quick.folder).encode() not in content, path
        assert str(Path.home()).encode() + b"/" not in content or str(Path.home()) == "/", path


def test_the_exported_champion_answers_from_its_file_alone(quick: Project) -> None:
    import onnxruntime

    crowned = quick.json("models/quick/champion/champion.json")
    assert crowned["exported"]
    session = onnxruntime.InferenceSession(
        str(quick.folder / "models/quick/champion/model.onnx"), providers=["CPUExecutionProvider"]
    )
    images = np.load(quick.folder / "data/raw/digits/test_images.npy")
    labels = np.load(quick.folder / "data/raw/digits/test_labels.npy")
    x = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    logits = session.run(["logits"], {session.get_inputs()[0].name: x})[0]
    assert abs((logits.argmax(1) == labels).mean() - crowned["clean"]) < 0.005


def test_every_file_was_attacked_as_served_and_the_champion_carries_its_card(quick: Project) -> None:
    for row in ("standard", "at_pgd", "atld"):
        report = quick.json(f"reports/quick/release/{row}.json")
        exported = {path.stem for path in (quick.folder / f"models/quick/exported/{row}").glob("*.onnx")}
        assert set(report["files"]) == exported
        for name, file in report["files"].items():
            card = verify(quick.folder / f"models/quick/released/{row}/{name}")
            assert card.sha256 == file["sha256"] and card.gate is not None
            assert card.gate.passed == file["passed"] == (file["failed"] == [])
            assert file["served"]["n"] == file["table"]["n"] == 50  # of the smallest suite
    card = verify(quick.folder / "models/quick/champion")
    assert card.gate is not None and card.gate.passed
    crowned = quick.json("models/quick/champion/champion.json")
    assert (card.provenance.row, card.provenance.mode) == (crowned["row"], crowned["mode"])


def test_parity_was_measured_and_passed(quick: Project) -> None:
    for row in ("standard", "at_pgd", "atld"):
        report = quick.json(f"reports/quick/export/{row}.json")
        assert report["files"] and all(file["passed"] for file in report["files"])
    forms = {file["form"] for file in quick.json("reports/quick/export/atld.json")["files"]}
    assert {"imt", "limited"} <= forms


def test_runs_are_recorded_and_lead_to_outputs(quick: Project) -> None:
    with sqlite3.connect(quick.folder / ".casemate/mlflow/mlflow.db") as store:
        names = [row[0] for row in store.execute("select name from runs")]
        aliases = list(store.execute("select alias, version from registered_model_aliases"))
    assert {"train@at_pgd", "evaluate@atld", "export@atld", "report"} <= set(names)
    assert [a for a, _ in aliases] == ["champion"]
    found = quick.python("-m", "pipeline", "runs", "find", "models/quick/trained/at_pgd/weights.safetensors")
    assert "train@at_pgd" in found.stdout
    assert not (quick.folder / "mlruns").exists() and not (quick.folder / "mlflow.db").exists()


def test_a_clone_pulls_clean(quick: Project, tmp_path: Path) -> None:
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    quick.run("git", "add", "-A")
    quick.run("git", "commit", "-qm", "results")
    quick.dvc("remote", "add", "--local", "-f", "-d", "store", str(remote))
    quick.dvc("push", "-q")
    quick.run("git", "clone", "-q", str(quick.folder), str(clone))
    copy = Project.__new__(Project)
    copy.folder = clone
    copy.dvc("remote", "add", "--local", "-d", "store", str(remote))
    copy.dvc("pull", "-q")
    copy.assert_nothing_to_do()
    copy.python("-m", "pipeline", "runs", "rebuild")
    with sqlite3.connect(clone / ".casemate/mlflow/mlflow.db") as store:
        names = {row[0] for row in store.execute("select name from runs")}
    assert {"train@at_pgd", "evaluate@atld"} <= names


def test_an_experiment_changes_what_it_should(quick: Project) -> None:
    quick.run("git", "add", "-A")
    quick.run("git", "commit", "-qm", "results", check=False)
    done = quick.dvc("exp", "run", "-n", "gentler", "-S", "evaluate.sweep.images=100", "evaluate@standard")
    assert "Running stage 'evaluate@standard'" in done.stdout
    assert "Running stage 'train" not in done.stdout
    shown = quick.dvc("exp", "show", "--csv").stdout
    assert "gentler" in shown
    assert "clean" in quick.dvc("metrics", "diff", "HEAD").stdout + quick.dvc("metrics", "show").stdout
    quick.dvc("plots", "show", "-q")
    assert "evaluate@standard" in quick.dvc("dag", "--dot").stdout
    quick.run("git", "checkout", "-q", "--", ".")
    quick.dvc("checkout", "-q")
