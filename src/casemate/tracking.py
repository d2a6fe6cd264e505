"""The MLflow recorder: one run per pipeline, a child per stage.

MLflow is a log and never an input: a server that cannot be reached costs a warning, not a training.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from casemate.errors import first_line

if TYPE_CHECKING:
    from casemate.params import Params

CONNECT_SECONDS = 2.0
BATCH = 1000  # MLflow's own limit on the metrics of one request
PARAM_LENGTH = 6000

for name, value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}.items():
    os.environ.setdefault(name, value)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


# --- where the runs are kept --------------------------------------------------------------------------------


def local_uri(store: Path) -> str:
    return f"sqlite:///{store.resolve() / 'mlflow.db'}"


def tracking_uri(store: Path) -> str:
    """The user's MLFLOW_TRACKING_URI if it answers, else the sqlite file in `store` (with a warning)."""
    wanted = os.environ.get("MLFLOW_TRACKING_URI")
    if not wanted:
        return local_uri(store)
    parts = urlsplit(wanted)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
        except OSError as error:
            warn(f"MLflow server {parts.scheme}://{parts.hostname}:{port} does not answer ({error}); "
                 f"recording in {store} instead")  # fmt: skip
            return local_uri(store)
    return wanted


def connect(store: Path, experiment: str) -> tuple[Any, str]:
    """(MlflowClient, experiment id); the experiment and the local artifact folder are made if needed."""
    import mlflow
    from mlflow.tracking import MlflowClient

    quiet()
    store.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(store)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    with _locked(store / "parent.lock"):
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        artifacts = (store.resolve() / "artifacts").as_uri() if uri == local_uri(store) else None
        return client, client.create_experiment(experiment, artifact_location=artifacts)


def quiet() -> None:
    import logging

    for noisy in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def pipeline_key(profile: str) -> str:
    """One pipeline run per profile and experiment (`dvc exp`) or commit."""
    name = os.environ.get("DVC_EXP_NAME")
    return f"{profile}-{name or commit()}"


def commit() -> str:
    """The short commit of the working tree, `uncommitted` outside git."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "uncommitted"


def parent_run(client: Any, experiment: str, key: str, store: Path, tags: Mapping[str, str]) -> str:
    """The pipeline's run, made once however many stages start at the same time."""
    with _locked(store / "parent.lock"):
        found = client.search_runs([experiment], f"tags.`casemate.pipeline` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = client.create_run(experiment, run_name=key, tags={"casemate.pipeline": key, **tags})
        client.set_terminated(made.info.run_id)
        return str(made.info.run_id)


# --- the recorder -------------------------------------------------------------------------------------------


class MlflowRecorder:
    """Writes one run. Metrics are buffered and sent in batches; after a failure it goes quiet with one warning."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._buffer: list[tuple[str, float, int, int]] = []
        self._failed = False

    def params(self, values: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names; long values are cut, as MLflow limits them."""
        from mlflow.entities import Param

        flat = [Param(k[:250], str(v)[:PARAM_LENGTH]) for k, v in _flatten(values)]
        for start in range(0, len(flat), 100):
            self.send(lambda part=flat[start : start + 100]: self.client.log_batch(self.run_id, params=part))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        self._buffer += [(k, float(v), now, step) for k, v in values.items() if v is not None]
        if len(self._buffer) >= BATCH:
            self.flush()

    def flush(self) -> None:
        from mlflow.entities import Metric

        waiting, self._buffer = self._buffer, []
        for start in range(0, len(waiting), BATCH):
            part = [Metric(*item) for item in waiting[start : start + BATCH]]
            self.send(lambda part=part: self.client.log_batch(self.run_id, metrics=part))

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        part = [RunTag(k, v) for k, v in values.items()]
        self.send(lambda: self.client.log_batch(self.run_id, tags=part))

    def artifact(self, path: Path) -> None:
        self.send(lambda: self.client.log_artifact(self.run_id, str(path)))

    def output(self, path: Path) -> None:
        """Tag the run with a DVC output: `dvc.lock` holds the same MD5, so each leads to the other."""
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        self.tags({"dvc.out": str(path), "dvc.out.md5": digest})

    def send(self, call: Any) -> None:
        """Call it, unless a call failed before; a failure costs a warning."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # a log must never cost a training, whatever its client raises
            self._failed = True
            warn(f"MLflow stopped recording this stage: {type(error).__name__}: {first_line(error)}")


class SilentRecorder(MlflowRecorder):
    """Takes everything and keeps nothing: what a stage gets where MLflow is not installed, or has no store at all."""

    def __init__(self) -> None:
        super().__init__(None, "")
        self._failed = True

    def params(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Nothing."""


@contextmanager
def stage_run(params: Params, stage: str, row: str | None, store: Path) -> Iterator[MlflowRecorder]:
    """The run of a stage: a child of the pipeline's run, marked failed if the stage fails."""
    name = stage if row is None else f"{stage}@{row}"
    try:
        client, experiment = connect(store, params.tracking.experiment)
        tags = {"casemate.profile": params.profile, "git.commit": commit()}
        parent = parent_run(client, experiment, pipeline_key(params.profile), store, tags)
        run = client.create_run(experiment, run_name=name, tags={
            **tags, "mlflow.parentRunId": parent, "casemate.stage": stage, "casemate.row": row or "",
            "dvc.stage": os.environ.get("DVC_STAGE", name), "dvc.exp": os.environ.get("DVC_EXP_NAME", ""),
        })  # fmt: skip
    except Exception as error:  # as above
        warn(f"MLflow cannot record {name}: {type(error).__name__}: {first_line(error)}")
        yield SilentRecorder()
        return
    recorder = MlflowRecorder(client, run.info.run_id)
    recorder.params({
        "profile": params.profile, "dataset": params.dataset, "seed": params.seed, "budget": params.budget,
        "threat": f"{params.threat.norm} {params.threat.radius:g}",
    })  # fmt: skip
    try:
        yield recorder
    except BaseException:
        recorder.flush()
        with contextlib.suppress(Exception):
            client.set_terminated(run.info.run_id, "FAILED")
        raise
    recorder.flush()
    with contextlib.suppress(Exception):
        client.set_terminated(run.info.run_id)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- leading from outputs to runs, and back -----------------------------------------------------------------


def find_runs(store: Path, experiment: str, digest: str) -> list[Any]:
    """The runs that made the DVC output with this MD5, newest first."""
    client, known = connect(store, experiment)
    return list(client.search_runs([known], f"tags.`dvc.out.md5` = '{digest}'"))


# --- runs for a fresh clone ----------------------------------------------------------------------------------


def rebuild(store: Path, experiment: str, reports: Path, say: Any = print) -> int:
    """Make runs from the committed cards of every profile, so that the UI is not empty after a clone.

    Runs that were rebuilt from the same file content before are left alone. Returns how many were made.
    """
    client, known = connect(store, experiment)
    made = 0
    for profile in sorted(p.parent for p in reports.glob("*/leaderboard.json")):
        key = f"{profile.name}-rebuilt"
        parent = parent_run(client, known, key, store, {"casemate.profile": profile.name})
        for path in sorted([*profile.glob("train/*.json"), *profile.glob("evaluate/*.json")]):
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if client.search_runs([known], f"tags.`casemate.rebuilt` = '{digest}'", max_results=1):
                continue
            stage, row = path.parent.name, path.stem
            run = client.create_run(known, run_name=f"{stage}@{row}", tags={
                "mlflow.parentRunId": parent, "casemate.rebuilt": digest, "casemate.stage": stage,
                "casemate.row": row, "casemate.profile": profile.name,
            })  # fmt: skip
            _refill(MlflowRecorder(client, run.info.run_id), stage, json.loads(path.read_text()), profile, row)
            client.set_terminated(run.info.run_id)
            made += 1
            say(f"{profile.name}: {stage}@{row}")
    return made


def _refill(recorder: MlflowRecorder, stage: str, content: dict[str, Any], profile: Path, row: str) -> None:
    if stage == "evaluate":
        recorder.params({k: content[k] for k in ("profile", "dataset", "network", "method", "seed", "budget")})
        recorder.metrics(evaluation_metrics(content))
    else:
        recorder.metrics({k: v for k, v in _flatten(content) if isinstance(v, int | float)})
        for step, values in enumerate(read_curves(profile / "curves" / f"{row}.csv"), 1):
            recorder.metrics(values, step)
    recorder.flush()


def read_curves(path: Path) -> list[dict[str, float]]:
    """The rows of a curves file as numbers; empty if there is none."""
    import csv

    if not path.exists():
        return []
    with open(path, newline="") as handle:
        return [{k: float(v) for k, v in line.items() if v not in ("", None)} for line in csv.DictReader(handle)]


def evaluation_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The leaderboard's figures of one row: comparable between runs in the UI."""
    primary = next(s for s in result["systems"] if s["primary"])
    metrics = {"clean": primary["clean"]["accuracy"]}
    for suite, sides in primary["worst"].items():
        for side, worst in sides.items():
            if worst is not None and worst.get("accuracy") is not None:
                metrics[f"worst_{side}_{suite}"] = worst["accuracy"]
    for cell in primary["cells"]:
        metrics[f"robust_{cell['view']}/{cell['attack']}"] = cell["accuracy"]
    return metrics


def detection_metrics(table: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `run_protocol` at each detector's own threshold over all attacked images, and what the joint
    attack leaves."""
    metrics = {}
    for row in table["rows"]:
        if row["own"] and row["scope"] == "all":
            for figure in ("acc_adv", "acc_nadv", "acc_com", "system_natural", "auroc", "tpr_at_5_fpr"):
                metrics[f"{row['detector']}/{row['fitted_on']}/{row['tested_on']}/{figure}"] = row[figure]
    for row in table["adaptive"]:
        metrics[f"{row['detector']}/{row['fitted_on']}/joint {row['threat']}"] = row["accuracy"]
    return metrics
