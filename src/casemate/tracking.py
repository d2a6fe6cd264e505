"""The MLflow recorder: one run per pipeline, a child per stage.

MLflow is a log and never an input: a server that cannot be reached costs a warning, not a training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casemate.errors import UserError, first_line
from casemate.run_store import connect as connect
from casemate.run_store import local_uri as local_uri
from casemate.run_store import locked, usable
from casemate.run_store import warn as warn

if TYPE_CHECKING:
    from casemate.params import Params

BATCH = 1000  # MLflow's own limit on the metrics of one request
PARAM_LENGTH = 6000

# --- which run is whose --------------------------------------------------------------------------------------


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
    with locked(store / "parent.lock"):
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
        digest = _md5(path)
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


def find_runs(store: Path, experiment: str, output: Path) -> list[Any]:
    """The runs that made this output of a stage as it is now (by its MD5), newest first. Raises UserError if none."""
    digest = _md5(output)
    client, known = connect(store, experiment)
    with usable(client.tracking_uri, store):
        found = list(client.search_runs([known], f"tags.`dvc.out.md5` = '{digest}'"))
    if not found:
        raise UserError(
            f"no run recorded {output} as it is now (MD5 {digest}): one does when its stage writes its output, and "
            "runs that were rebuilt from reports know of none"
        )
    return found


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


# --- runs for a fresh clone ----------------------------------------------------------------------------------


def rebuild(store: Path, experiment: str, reports: Path, say: Any = print) -> int:
    """Make runs from the committed cards of every profile, so that the UI is not empty after a clone.

    Rows that a real run recorded are left alone, and so are runs that were rebuilt from the same file content before.
    Returns how many were made. Raises UserError for a report that is damaged; no run is made of it.
    """
    client, known = connect(store, experiment)
    made = 0
    with usable(client.tracking_uri, store):
        for profile in sorted(p.parent for p in reports.glob("*/leaderboard.json")):
            for path in sorted([*profile.glob("train/*.json"), *profile.glob("evaluate/*.json")]):
                tags = {
                    "casemate.rebuilt": _md5(path),
                    "casemate.stage": path.parent.name, "casemate.row": path.stem, "casemate.profile": profile.name,
                }  # fmt: skip
                if _recorded(client, known, tags):
                    continue
                figures = _figures(path, profile)
                key = f"{profile.name}-rebuilt"
                parent = parent_run(client, known, key, store, {"casemate.profile": profile.name})
                name = f"{path.parent.name}@{path.stem}"
                run = client.create_run(known, run_name=name, tags={**tags, "mlflow.parentRunId": parent})
                _refill(MlflowRecorder(client, run.info.run_id), *figures)
                client.set_terminated(run.info.run_id)
                made += 1
                say(f"{profile.name}: {name}")
    return made


def _recorded(client: Any, experiment: str, tags: Mapping[str, str]) -> bool:
    """Whether a stage recorded this row to its end, or a run was rebuilt from this very report."""
    same = [f"tags.`{key}` = '{tags[key]}'" for key in ("casemate.stage", "casemate.row", "casemate.profile")]
    runs = client.search_runs([experiment], " and ".join([*same, "attributes.status = 'FINISHED'"]))
    return any(run.data.tags.get("casemate.rebuilt") in (None, tags["casemate.rebuilt"]) for run in runs)


Curves = list[dict[str, float]]


def _figures(path: Path, profile: Path) -> tuple[dict[str, Any], dict[str, float], Curves]:
    """(parameters, metrics, curves) of a committed report, all read before a run is made of them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == "evaluate":
            names = ("profile", "dataset", "network", "method", "seed", "budget")
            return {k: content[k] for k in names}, evaluation_metrics(content), []
        metrics = {k: v for k, v in _flatten(content) if isinstance(v, int | float)}
    except KeyError as error:
        raise UserError(f"{path} is damaged: it lacks {error}; 'git checkout {path}' restores it") from None
    except (ValueError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); 'git checkout {path}' restores it") from None
    curves = profile / "curves" / f"{path.stem}.csv"
    try:
        return {}, metrics, read_curves(curves)
    except (ValueError, TypeError) as error:
        raise UserError(f"{curves} is damaged ({first_line(error)}); 'git checkout {curves}' restores it") from None


def _refill(recorder: MlflowRecorder, params: dict[str, Any], metrics: dict[str, float], curves: Curves) -> None:
    recorder.params(params)
    recorder.metrics(metrics)
    for step, values in enumerate(curves, 1):
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
