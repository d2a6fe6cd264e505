"""Models in the MLflow registry: versions of exported files, what was measured on them, and the alias `champion`.

A version carries the MD5 of its file in the tag `dvc.out.md5`, and once the file was released its card, as JSON, in
the tag `casemate.card`: whoever loads it by name learns as much of it as from the released folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casemate.errors import UserError, first_line, shorten
from casemate.run_store import client_of, connect, local_uri, quiet, reading_uri, usable, warn
from casemate.tracking import MlflowRecorder

MD5, CARD = "dvc.out.md5", "casemate.card"
REFERENCE = re.compile(r"(?P<name>[\w][\w .-]{0,199})(?:@(?P<alias>[\w-]{1,100})|/(?P<version>[0-9]{1,9}))")
PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@dataclass(frozen=True)
class Registered:
    """A version of a registered model: its files are in `folder`."""

    name: str
    version: str
    folder: Path
    tags: Mapping[str, str]


def registered_model(store: Path, reference: str) -> Registered:
    """The version that NAME@ALIAS or NAME/VERSION means, in the user's MLFLOW_TRACKING_URI, else in `store`.

    Raises UserError if the reference is neither, there is no such model, no registry, or the server that is named
    does not answer: a model of that name elsewhere is another one.
    """
    shown = f"models:/{shorten(reference)}"
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise UserError(f"{shown} names no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = reading_uri(store)
    if uri == local_uri(store) and not (store / "mlflow.db").exists():
        raise UserError(f"{shown}: there is no registry in {store}; 'dvc repro' makes it, or set MLFLOW_TRACKING_URI")
    try:
        import mlflow
    except ImportError:
        raise UserError(f"{shown}: the registry needs MLflow; pip install 'casemate[pipeline]'") from None
    name = parts["name"]
    with usable(uri, store):
        client = client_of(uri)
        try:
            found = (
                client.get_model_version_by_alias(name, parts["alias"]) if parts["alias"]
                else client.get_model_version(name, parts["version"])
            )  # fmt: skip
            folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{found.version}")
        except (mlflow.exceptions.MlflowException, OSError) as error:
            known = ", ".join(sorted(m.name for m in client.search_registered_models(max_results=20))) or "none"
            said = first_line(error)
            raise UserError(f"{shown} is not to be had ({said}); registered models: {known}") from None
    return Registered(name, str(found.version), Path(folder), dict(found.tags))


def register(recorder: MlflowRecorder, path: Path, *, example: Any, registered: str, tags: Mapping[str, str]) -> None:
    """Log an ONNX file to the recorder's run with its signature and example, and make it a new version of
    `registered`."""
    recorder.send(lambda: _register(recorder.client, recorder.run_id, path, example, registered, tags))


def _register(client: Any, run_id: str, path: Path, example: Any, registered: str, tags: Mapping[str, str]) -> None:
    import mlflow

    with mlflow.start_run(run_id=run_id):
        name = path.stem.replace(".", "-")  # MLflow takes no dot
        logged = mlflow.onnx.log_model(name=name, input_example=example, **_model(path, example))
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        client.create_registered_model(registered)
    client.create_model_version(registered, logged.model_uri, run_id=run_id, tags=dict(tags))


def save_onnx(path: Path, folder: Path) -> None:
    """An ONNX file as an MLflow model in a folder of its own, weights inside, for servers that load MLflow models."""
    import mlflow.onnx

    quiet()
    mlflow.onnx.save_model(path=str(folder), **_model(path))


def _model(path: Path, example: Any = None) -> dict[str, Any]:
    """What MLflow wants to know of an ONNX file. `example`: a batch of inputs; zeros, if None."""
    import mlflow
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.models import infer_signature

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    if example is None:
        example = np.zeros((1, *taken.shape[1:]), np.uint8 if taken.type == "tensor(uint8)" else np.float32)
    answers = session.run(None, {taken.name: example})
    outputs = {output.name: answer for output, answer in zip(session.get_outputs(), answers, strict=True)}
    return {
        "onnx_model": onnx.load(str(path)), "signature": infer_signature({taken.name: example}, outputs),
        "onnx_execution_providers": PROVIDERS, "save_as_external_data": False,
        "pip_requirements": [f"mlflow=={mlflow.__version__}", f"onnx=={onnx.__version__}", "onnxruntime"],
    }  # fmt: skip


def set_champion(store: Path, experiment: str, registered: str, digest: str | None) -> str | None:
    """Put the alias `champion` on the newest registered version of the file with this MD5; take it away for None.

    Returns the version, or None if there is none.
    """
    import mlflow

    client, _ = connect(store, experiment)
    try:
        if digest is None:
            client.delete_registered_model_alias(registered, "champion")
            return None
        versions = client.search_model_versions(f"name = '{registered}'")
    except mlflow.exceptions.MlflowException:
        return None
    fitting = [v for v in versions if v.tags.get(MD5) == digest]
    if not fitting:
        return None
    best = max(fitting, key=lambda v: int(v.version))
    client.set_registered_model_alias(registered, "champion", best.version)
    return str(best.version)


def describe(store: Path, experiment: str, registered: str, digest: str, tags: Mapping[str, str], text: str) -> None:
    """Put tags and a Markdown description on every registered version of the file with this MD5; a store that cannot
    be reached costs a warning."""
    try:
        client, _ = connect(store, experiment)
        for version in client.search_model_versions(f"name = '{registered}'"):
            if version.tags.get(MD5) != digest:
                continue
            for key, value in tags.items():
                client.set_model_version_tag(registered, version.version, key, value)
            client.update_model_version(registered, version.version, text)
    except Exception as error:  # a log must never cost a stage, whatever its client raises
        warn(f"MLflow has no description of {registered}: {type(error).__name__}: {first_line(error)}")
