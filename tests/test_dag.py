"""dvc.yaml and the Snakefile are one graph, and a killed or doubled run is recognised."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import dag, run_stage


@pytest.fixture(scope="module")
def stages() -> dict[str, dag.Stage]:
    return dag.load(".")


def test_the_stages_stand_in_the_order_of_the_plan(stages: dict[str, dag.Stage]) -> None:
    assert stages["train@at_pgd"].upstream == ["download"]
    assert set(stages["finetune@at_pgd"].upstream) == {"download", "train@at_pgd"}
    assert set(stages["evaluate@at_pgd"].upstream) == {
        "download", "train@at_pgd", "finetune@at_pgd", "pretrain@standard",
    }  # fmt: skip
    assert "evaluate@at_pgd" in stages["export@at_pgd"].upstream
    assert {"export@at_pgd", "evaluate@at_pgd", "train@at_pgd"} <= set(stages["release@at_pgd"].upstream)
    assert {"release@atld", "export@atld", "evaluate@atld", "train@atld", "pretrain@standard"} <= set(
        stages["report"].upstream
    )


def test_resources_come_from_meta(stages: dict[str, dag.Stage]) -> None:
    train = stages["train@trades"]
    assert (train.threads, train.local, train.resources["gpu"]) == (2, False, 1)
    assert stages["report"].local and stages["report"].rule == "report"
    assert train.rule == "train_trades"


@pytest.mark.parametrize("meta", [{"thread": 2}, {"threads": "2"}, {"gpu": True}, {"local": 1}])
def test_bad_meta_is_one_line(meta: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match=r"dvc.yaml: train@x: .*meta"):
        dag._stage("train@x", [], dict(meta))


def write_pipeline(folder: Path, names: list[str]) -> None:
    stages = "".join(f"  {n}:\n    cmd: echo {n} > {n}.txt\n    outs: ['{n}.txt']\n" for n in names)
    (folder / "dvc.yaml").write_text("stages:\n" + stages)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)


def test_colliding_rule_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path, ["a-b", "a_b"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="share the rule name a_b"):
        dag.load()


def test_stamps_follow_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path, ["a"])
    monkeypatch.chdir(tmp_path)
    found = dag.load(".")
    stamp = Path(found["a"].stamp)
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    dag.sync_stamps(found)
    assert not stamp.exists()  # DVC has never run it
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    dag.sync_stamps(found)
    assert stamp.stat().st_mtime == dag.STAMP_TIME


def test_a_dead_runs_lock_is_cleared_and_a_live_ones_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").touch()
    with open(tmp_path / ".snakemake" / "engine.lock", "w") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        assert dag.hold_engine_lock() is None
        assert list(locks.iterdir())
    held = dag.hold_engine_lock()
    assert held is not None and not list(locks.iterdir())
    held.close()


def test_gpu_ids_are_handed_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, held = run_stage.claim_gpus(1, ["0", "1"])
    second, more = run_stage.claim_gpus(1, ["0", "1"])
    assert (first, second) == (["0"], ["1"])
    held[0].close()
    assert run_stage.claim_gpus(1, ["0", "1"])[0] == ["0"]
    more[0].close()


def test_an_engine_is_alive_until_it_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert run_stage.alive(child.pid) and run_stage.alive(os.getpid()) and run_stage.alive(0)
    child.kill()
    child.wait()
    assert not run_stage.alive(child.pid)
