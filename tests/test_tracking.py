"""The recorder against a real MLflow store: parent and children, batches, lineage, fallback, rebuilt runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from casemate import run_store, tracking
from casemate.errors import UserError
from casemate.params import Params, check_params
from pipeline.profile import resolved

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def params() -> Params:
    return check_params(resolved("smoke"))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)


def all_runs(store: Path) -> list[Any]:
    client, experiment = tracking.connect(store, "casemate")
    return list(client.search_runs([experiment]))


def test_stages_are_children_of_one_pipeline_run(tmp_path: Path, params: Params) -> None:
    store = tmp_path / "mlflow"

    def record(row: str) -> None:
        with tracking.stage_run(params, "train", row, store) as recorder:
            recorder.params({"recipe": {"lr": 0.1}})
            for step in range(3):
                recorder.metrics({"loss": 1.0 - step / 10}, step)

    record("first")  # makes the database
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(record, ["a", "b", "c"]))
    runs = all_runs(store)
    parents = [r for r in runs if "casemate.pipeline" in r.data.tags]
    children = [r for r in runs if r.data.tags.get("casemate.stage") == "train"]
    assert len(parents) == 1 and len(children) == 4
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parents[0].info.run_id}
    assert all(r.data.params["recipe.lr"] == "0.1" and r.info.status == "FINISHED" for r in children)
    client, _ = tracking.connect(store, "casemate")
    assert [m.value for m in client.get_metric_history(children[0].info.run_id, "loss")] == [1.0, 0.9, 0.8]
    assert not (Path.cwd() / "mlruns").exists()


def test_an_output_leads_to_its_run_and_a_failed_stage_says_so(tmp_path: Path, params: Params) -> None:
    store, output = tmp_path / "mlflow", tmp_path / "weights.safetensors"
    output.write_bytes(b"weights")
    with tracking.stage_run(params, "train", "a", store) as recorder:
        recorder.output(output)
    with pytest.raises(RuntimeError), tracking.stage_run(params, "train", "b", store):
        raise RuntimeError
    (found,) = tracking.find_runs(store, "casemate", output)
    assert found.info.run_name == "train@a" and found.data.tags["dvc.out"] == str(output)
    digest = subprocess.run(["md5sum", output], capture_output=True, text=True, check=True).stdout.split()[0]
    assert found.data.tags["dvc.out.md5"] == digest  # as dvc.lock has it
    output.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"no run recorded .*weights.safetensors as it is now \(MD5 [0-9a-f]{32}\)"):
        tracking.find_runs(store, "casemate", output)
    assert {r.info.run_name: r.info.status for r in all_runs(store)}["train@b"] == "FAILED"


def test_a_server_that_does_not_answer_costs_a_warning(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with tracking.stage_run(params, "train", "a", tmp_path / "mlflow") as recorder:
        recorder.metrics({"x": 1.0})
    assert time.monotonic() - began < 20
    assert "does not answer" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert any(r.data.metrics == {"x": 1.0} for r in all_runs(tmp_path / "mlflow"))


def test_an_error_without_words_costs_a_warning(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent() -> None:
        raise TimeoutError

    with tracking.stage_run(params, "train", "a", tmp_path / "mlflow") as recorder:
        recorder.send(silent)
    assert "MLflow stopped recording this stage: TimeoutError: TimeoutError" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow").write_text("a file where the folder should be")
    with tracking.stage_run(params, "train", "a", tmp_path / "mlflow") as recorder:
        recorder.metrics({"x": 1.0})
        recorder.params({"y": 2})
    assert "MLflow cannot record train@a" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["foo://x", "some/folder", "http://host:port", "http://[x"])
def test_a_bad_address_is_one_line(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=.*unset it") as caught:
        tracking.find_runs(tmp_path / "mlflow", "casemate", Path(__file__))
    assert "\n" not in str(caught.value) and uri in str(caught.value)


def test_recording_does_not_speak_for_the_user(tmp_path: Path, params: Params) -> None:
    for store in (tmp_path / "a", tmp_path / "b"):
        with tracking.stage_run(params, "train", "a", store):
            pass
        assert "MLFLOW_TRACKING_URI" not in os.environ and (store / "mlflow.db").exists()


def test_messages_hold_no_password() -> None:
    assert run_store.shown("postgresql://me:secret@host/runs") == "postgresql://host/runs"


def test_a_damaged_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    for call in (
        lambda: tracking.find_runs(tmp_path, "casemate", Path(__file__)),
        lambda: rebuilt(tmp_path, tmp_path),
    ):
        with pytest.raises(UserError, match=r"mlflow.db cannot be used .*runs rebuild") as caught:
            call()
        assert "\n" not in str(caught.value)


def write_reports(reports: Path) -> Path:
    """The committed reports of a profile with one row; returns its folder."""
    worst = {"accuracy": 0.9, "low": 0.88, "high": 0.92, "n": 1000}
    system = {
        "primary": True, "clean": {"accuracy": 0.98}, "worst": {"core": {"adaptive": worst, "static": None}},
        "cells": [{"attack": "pgd", "view": "adaptive", "accuracy": 0.91}],
    }  # fmt: skip
    evaluation = {"profile": "mnist", "dataset": "mnist", "network": "lenet5", "method": "at_pgd", "seed": 0,
                  "budget": 1.0, "systems": [system]}  # fmt: skip
    for name, content in {
        "leaderboard.json": "{}", "train/at_pgd.json": json.dumps({"val_clean": 0.97}),
        "evaluate/at_pgd.json": json.dumps(evaluation), "curves/at_pgd.csv": "epoch,loss\n1,2.0\n2,1.5\n",
    }.items():  # fmt: skip
        (reports / "mnist" / name).parent.mkdir(parents=True, exist_ok=True)
        (reports / "mnist" / name).write_text(content)
    return reports / "mnist"


def rebuilt(store: Path, reports: Path) -> int:
    return tracking.rebuild(store, "casemate", reports, lambda _: None)


def test_runs_are_rebuilt_from_reports_once(tmp_path: Path) -> None:
    reports, store = write_reports(tmp_path / "reports").parent, tmp_path / "mlflow"
    assert rebuilt(store, reports) == 2
    assert rebuilt(store, reports) == 0
    runs = {r.info.run_name: r for r in all_runs(store)}
    assert runs["evaluate@at_pgd"].data.metrics["worst_adaptive_core"] == 0.9
    assert runs["train@at_pgd"].data.metrics == {"val_clean": 0.97, "epoch": 2.0, "loss": 1.5}


def test_rows_that_a_real_run_recorded_are_not_rebuilt(tmp_path: Path, params: Params) -> None:
    reports, store = tmp_path / "reports", tmp_path / "mlflow"
    write_reports(reports).rename(reports / params.profile)
    with tracking.stage_run(params, "evaluate", "at_pgd", store):
        pass
    with pytest.raises(RuntimeError), tracking.stage_run(params, "train", "at_pgd", store):
        raise RuntimeError  # of a run that failed the report says more
    assert rebuilt(store, reports) == 1
    names = [r.info.run_name for r in all_runs(store)]
    assert names.count("evaluate@at_pgd") == 1 and names.count("train@at_pgd") == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluate/at_pgd.json", '{"profile": ', "is damaged"),
        ("evaluate/at_pgd.json", '{"profile": "mnist"}', "it lacks 'dataset'"),
        ("evaluate/at_pgd.json", "[]", "is damaged"),
        ("train/at_pgd.json", "[]", "is damaged"),
        ("train/at_pgd.json", "\x00", "is damaged"),
        ("curves/at_pgd.csv", "epoch,loss\n1,two\n", "is damaged"),
    ],
)
def test_a_damaged_report_is_named_and_makes_no_run(tmp_path: Path, name: str, content: str, said: str) -> None:
    profile, store = write_reports(tmp_path / "reports"), tmp_path / "mlflow"
    whole = (profile / name).read_text()
    (profile / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is damaged.*git checkout") as caught:
        rebuilt(store, profile.parent)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    (profile / name).write_text(whole)
    rebuilt(store, profile.parent)
    names = [r.info.run_name for r in all_runs(store)]
    assert sorted(n for n in names if "@" in n) == ["evaluate@at_pgd", "train@at_pgd"]


def test_telemetry_is_off() -> None:
    code = "import os, casemate.tracking; print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    clean = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.split() == ["true", "true"]
    assert "analytics = false" in Path(".dvc/config").read_text()


def test_a_stage_runs_where_mlflow_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlflow"] + ["mlflow"]:
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / "out"
    output.write_text("made")
    with tracking.stage_run(check_params(resolved("smoke")), "train", "atld", tmp_path / "store") as recorder:
        recorder.params({"a": 1})
        recorder.metrics({"b": 2.0})
        recorder.tags({"c": "d"})
        recorder.output(output)
        recorder.artifact(output)
        recorder.flush()
