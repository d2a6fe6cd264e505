"""Where MLflow's runs and models are kept: a server or database that the user names, else a file of the project.

Who records falls back on the project's own store; who reads a model by name never does, as it would be another model.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from casemate.errors import UserError, first_line, shorten

CONNECT_SECONDS = 2.0
VARIABLE = "MLFLOW_TRACKING_URI"
SECRET = re.compile(r"(?<=//)[^/@\s]*@")
"""Who logs in, and with which password, in a URI."""
_ENVIRONMENT = threading.Lock()

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


def local_uri(store: Path) -> str:
    return f"sqlite:///{store.resolve() / 'mlflow.db'}"


def tracking_uri(store: Path) -> str:
    """Where to record: the user's MLFLOW_TRACKING_URI if it answers, else the sqlite file in `store` (with a
    warning). Raises UserError if it is no URI."""
    wanted = os.environ.get(VARIABLE)
    silent = silence(wanted) if wanted else None
    if silent is not None:
        warn(f"{silent}; recording in {store} instead")
    return local_uri(store) if silent is not None or not wanted else wanted


def reading_uri(store: Path) -> str:
    """Where to look models up: the user's MLFLOW_TRACKING_URI, else the sqlite file in `store`. Raises UserError if
    the server that is named does not answer: a model of the same name in `store` is another one."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return local_uri(store)
    silent = silence(wanted)
    if silent is not None:
        raise UserError(f"{silent}; start it, or unset {VARIABLE} for the models in {store}")
    return wanted


def silence(uri: str) -> str | None:
    """One line if `uri` is of a server that does not answer. Raises UserError if it is no URI."""
    try:
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UserError(f"{VARIABLE}={shown(uri)} is no URI ({error}); give http://HOST:PORT, or unset it") from None
    if parts.scheme not in ("http", "https"):
        return None
    try:
        socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        return f"MLflow server {parts.scheme}://{parts.hostname}:{port} does not answer ({error})"
    return None


def shown(uri: str) -> str:
    """A URI fit for a message: without passwords."""
    return shorten(SECRET.sub("", uri), 200)


@contextmanager
def usable(uri: str, store: Path) -> Iterator[None]:
    """Make what MLflow raises of a store that it cannot use a UserError of one line."""
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (mlflow.exceptions.MlflowException, SQLAlchemyError, FileExistsError, NotADirectoryError) as error:
        said = SECRET.sub("", first_line(error))
        if uri == local_uri(store):
            mend = "move it away, and 'python -m pipeline runs rebuild' makes runs from the reports"
            raise UserError(f"{store / 'mlflow.db'} cannot be used ({said}); {mend}") from error
        mend = "give http://HOST:PORT or sqlite:///FILE, or unset it"
        raise UserError(f"{VARIABLE}={shown(uri)} cannot be used ({said}); {mend}") from error


def client_of(uri: str) -> Any:
    """MLflow's client for a store, which is also made the one that MLflow's own functions use.

    MLflow writes the store into the environment too, where it would pass for the user's word on the next call.
    """
    import mlflow
    from mlflow.tracking import MlflowClient

    quiet()
    with _ENVIRONMENT:
        given = os.environ.get(VARIABLE)
        mlflow.set_tracking_uri(uri)
        if given is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = given
    return MlflowClient(uri)


def connect(store: Path, experiment: str) -> tuple[Any, str]:
    """(MlflowClient, experiment id) to record with; the experiment and the local artifact folder are made if needed.

    Raises UserError if the store is damaged, or MLFLOW_TRACKING_URI none that MLflow can use.
    """
    uri = tracking_uri(store)
    with usable(uri, store):
        store.mkdir(parents=True, exist_ok=True)
        client = client_of(uri)
        with locked(store / "parent.lock"):
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
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that one process at a time makes what all of them need."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
