"""The `smoke` profile for real, by Snakemake, in a copy of the project; then everything that can go wrong."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from casemate.reporting.study_file import load_study
from tests.project import Project, kill_hard, processes, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("smoke"), "smoke")
    project.snakemake("--cores", "2", "-q")
    yield project
    for pid in processes(project.folder):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _same_parameters_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed half-way must not make the next ones fail."""
    if "smoke" not in request.fixturenames:
        yield
        return
    file = request.getfixturevalue("smoke").folder / "params.yaml"
    kept = file.read_text()
    yield
    file.write_text(kept)


def change(project: Project, path: str, value: object) -> None:
    file = project.folder / "params.yaml"
    content = yaml.safe_load(file.read_text())
    *head, last = path.split(".")
    at = content
    for key in head:
        at = at[key]
    at[last] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def test_after_snakemake_both_engines_say_nothing_to_do(smoke: Project) -> None:
    smoke.assert_nothing_to_do()
    assert "digraph" in smoke.snakemake("--dag").stdout
    assert 'id="detectors-standard"' in (smoke.folder / "reports/smoke/index.html").read_text()


def test_the_study_stands_beside_the_leaderboard(smoke: Project) -> None:
    folder, index = smoke.folder / "reports/smoke/study", smoke.json("reports/smoke/study/index.json")
    assert index["models"] == ["standard"]
    assert index["files"] == sorted(p.name for p in folder.iterdir() if p.name != "index.json")
    made = {"study.json", "distances-standard.png", "sheet-standard.jpg", "strip-standard-fgsm.jpg"}
    assert made <= {*index["files"]}
    read = load_study(smoke.folder / "reports/smoke")
    assert read is not None and set(read.table["standard"]) == {"pgd20", "fgsm", "gap"}
    assert 0 < (read.median("standard", "fgsm", "linf") or 0) <= 0.2 + 1e-6
    assert (read.median("standard", "fgsm", "iwd") or 1) <= 0.2 + 1e-6, "the ball of linf lies in that of the IWD"
    page = (smoke.folder / "reports/smoke/index.html").read_text()
    assert 'id="study"' in page and 'href="study/sheet-standard.jpg"' in page
    matrix = smoke.json("reports/smoke/study/transfer.json")
    assert set(matrix["cells"]["standard"]) == {"standard", "atld"} and 'id="transfer"' in page
    assert matrix["cells"]["standard"]["standard"]["n"] == 40


def test_a_tuned_row_begins_where_its_start_ended(smoke: Project) -> None:
    start = smoke.json("models/smoke/trained/standard/card.json")["weights_sha256"]
    begun = smoke.json("models/smoke/trained/warm/card.json")["start"]
    assert (begun["row"], begun["weights_sha256"]) == ("standard", start)


def test_a_new_generator_leaves_those_that_are_fitted(smoke: Project) -> None:
    before = (smoke.folder / "models/smoke/generators/atld/gap/weights.safetensors").read_bytes()
    change(smoke, "finetune.generators.other", {
        "method": "gap", "options": {"width": 4},
        "recipe": {"epochs": 5, "lr": 0.01, "batch_size": 64},
    })  # fmt: skip
    done = smoke.dvc("repro", "-s", "finetune@atld")
    assert "gap: fitted to atld already" in done.stdout
    assert (smoke.folder / "models/smoke/generators/atld/gap/weights.safetensors").read_bytes() == before
    assert smoke.json("models/smoke/generators/atld/index.json") == ["gap", "other"]
    change(smoke, "finetune.victims", ["standard"])
    smoke.dvc("repro", "-s", "finetune@atld")
    assert not (smoke.folder / "models/smoke/generators/atld/gap").exists()
    done = smoke.dvc("repro", "-s", "evaluate@atld")
    assert "gap is left out: it is fitted to other rows only" in done.stdout


def test_a_row_trained_below_one_epoch_is_not_ranked(smoke: Project) -> None:
    change(smoke, "budget", 0.04)
    smoke.dvc("repro", "-s", "train@atld")
    smoke.dvc("repro", "-s", "finetune@atld")
    smoke.dvc("repro", "-s", "evaluate@atld")
    assert smoke.json("reports/smoke/evaluate/atld.json")["untrained"]
    change(smoke, "budget", 0.2)
    smoke.dvc("repro")  # the run cache brings back what was there
    smoke.assert_nothing_to_do()


def test_a_bad_parameter_stops_every_door_with_one_line(smoke: Project) -> None:
    change(smoke, "defenses.atld.options", {"imt_bnd": [0.1, 0.2]})
    for done in (
        smoke.snakemake("-n", check=False),
        smoke.python("-m", "pipeline.train", "--row", "atld", check=False),
        smoke.python("-m", "pipeline", "check", check=False),
        smoke.dvc("repro", check=False),
    ):
        said = done.stdout + done.stderr
        assert done.returncode != 0 and "Traceback" not in said
        assert "defenses.atld.options.imt_bnd: unknown key; did you mean 'imt_band'" in said


def test_a_gpu_that_is_absent_is_said(smoke: Project) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    change(smoke, "device", "cuda")
    done = smoke.python("-m", "pipeline.train", "--row", "atld", check=False)
    assert done.returncode == 2 and "no usable GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "stage",
    [
        "download",
        "subset",
        "pretrain",
        "train",
        "tune",
        "finetune",
        "evaluate",
        "detect",
        "study",
        "export",
        "export_detectors",
        "release",
        "report",
    ],
)
def test_every_stage_has_help(stage: str, smoke: Project) -> None:
    done = smoke.python("-m", f"pipeline.{stage}", "--help")
    assert f"python -m pipeline.{stage}" in done.stdout and "--params" in done.stdout


def test_a_row_that_does_not_exist_names_the_near_ones(smoke: Project) -> None:
    done = smoke.python("-m", "pipeline.train", "--row", "atdl", check=False)
    assert done.returncode == 2 and "did you mean 'atld'" in done.stderr and "Traceback" not in done.stderr


def long_training(project: Project, seed: int, epochs: int = 60) -> None:
    """Make train@atld stale, and long enough to be killed in the middle."""
    change(project, "seed", seed)
    change(project, "defenses.atld.recipe.epochs", epochs)
    shutil.rmtree(project.folder / ".casemate/checkpoints", ignore_errors=True)


def checkpointed(project: Project) -> bool:
    return any((project.folder / ".casemate/checkpoints").glob("*/*.json"))


def training(project: Project) -> list[int]:
    """The processes of a training stage: the stage, and a shell before it where one stays."""
    return [p for p in processes(project.folder) if b"pipeline.train" in Path(f"/proc/{p}/cmdline").read_bytes()]


def weights(project: Project) -> bytes:
    return (project.folder / "models/smoke/trained/atld/weights.safetensors").read_bytes()


@pytest.mark.parametrize(("shell", "seed"), [("/bin/bash", 1), ("/bin/sh", 6)])
def test_dvc_killed_in_training_resumes_to_the_same_weights(smoke: Project, shell: str, seed: int) -> None:
    long_training(smoke, seed)
    running = smoke.start("-m", "dvc", "repro", "-s", "train@atld", SHELL=shell)
    wait_until(lambda: checkpointed(smoke), 90, "a checkpoint")
    kill_hard(running)
    wait_until(lambda: not processes(smoke.folder), 20, "the stage to follow its engine")
    resumed = smoke.dvc("repro", "-s", "train@atld")
    assert "resumed after step" in resumed.stdout + resumed.stderr
    after_kill = weights(smoke)
    assert not checkpointed(smoke)
    smoke.dvc("repro", "-f", "-s", "train@atld")  # once more, undisturbed
    assert weights(smoke) == after_kill


def test_snakemake_killed_in_training_goes_on_without_unlock(smoke: Project) -> None:
    long_training(smoke, seed=2)
    running = smoke.start("-m", "snakemake", "train_atld", "--cores", "2", "-q")
    wait_until(lambda: checkpointed(smoke), 120, "a checkpoint")
    assert list((smoke.folder / ".snakemake/locks").glob("*"))
    kill_hard(running)
    wait_until(lambda: not processes(smoke.folder), 30, "the job to follow its engine")
    again = smoke.snakemake("train_atld", "--cores", "2", "-q")
    assert "its lock has been cleared" in again.stderr
    log = (smoke.folder / ".snakemake/stage-logs/train_atld.log").read_text()
    assert "resumed after step" in log


def test_a_stage_killed_alone_fails_the_pipeline_and_resumes(smoke: Project) -> None:
    long_training(smoke, seed=3)
    running = smoke.start("-m", "dvc", "repro", "-s", "train@atld")
    wait_until(lambda: checkpointed(smoke), 90, "a checkpoint")
    os.kill(training(smoke)[-1], signal.SIGKILL)
    assert running.wait(60) != 0
    resumed = smoke.dvc("repro", "-s", "train@atld")
    assert "resumed after step" in resumed.stdout + resumed.stderr


def test_two_pipelines_at_once_do_not_spoil_each_other(smoke: Project) -> None:
    long_training(smoke, seed=4)
    first = smoke.start("-m", "dvc", "repro", "-s", "train@atld")
    wait_until(lambda: checkpointed(smoke), 90, "a checkpoint")
    stage = training(smoke)
    for pid in stage:  # held while the others try, so that no machine is too fast for them to meet
        os.kill(pid, signal.SIGSTOP)
    second = smoke.dvc("repro", "-s", "train@atld", check=False)
    alone = smoke.python("-m", "pipeline.train", "--row", "atld", check=False)
    for pid in stage:
        os.kill(pid, signal.SIGCONT)
    for done in (second, alone):
        said = done.stdout + done.stderr
        assert done.returncode != 0 and "Traceback" not in said
    assert "is training exactly this" in alone.stderr
    assert first.wait(120) == 0


def test_a_corrupt_checkpoint_is_said_and_the_one_before_is_used(smoke: Project) -> None:
    long_training(smoke, seed=5)
    running = smoke.start("-m", "dvc", "repro", "-s", "train@atld")
    folder = smoke.folder / ".casemate/checkpoints"
    wait_until(lambda: len(list(folder.glob("*/*.safetensors"))) >= 2, 90, "two checkpoints")
    kill_hard(running)
    wait_until(lambda: not processes(smoke.folder), 20, "the stage to follow its engine")
    newest = max(folder.glob("*/*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = smoke.dvc("repro", "-s", "train@atld")
    said = resumed.stdout + resumed.stderr
    assert "resumed after step" in said and f"{newest.parent.name}/{newest.stem} is corrupt" in said
