"""`casemate.load`: a model by its file, its released folder, or its name in the MLflow registry."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from casemate.deploy import card as cards
from casemate.deploy.card import Card
from casemate.deploy.predict import Predictor
from casemate.deploy.session import Device
from casemate.errors import UserError

STORE = Path(".casemate/mlflow")
"""Where the pipeline keeps its registry, from the project's folder, unless MLFLOW_TRACKING_URI names another."""
SCHEME = "models:/"


@dataclass(frozen=True)
class Source:
    """Where a model's file is. `version` is the registry's, "1" for a plain file; `registered` its name there; `card`
    the one that the registry holds of it, a released folder's own being beside its file."""

    path: Path
    registered: str | None = None
    version: str = "1"
    card: Card | None = None

    def open(self, device: Device = "auto", *, threads: int | None = None) -> Predictor:
        """Raises UserError if the file cannot be used here, or is not its card's."""
        return Predictor(self.path, device, threads=threads, told=self.card)


def resolve(model: Path | str) -> Source:
    """`model`: a path, or models:/NAME@ALIAS or models:/NAME/VERSION of the registry.

    A registered file must have the MD5 that was recorded when it was registered. Raises UserError if there is no such
    model or its file was changed.
    """
    text = str(model)
    if not text.startswith(SCHEME):
        return Source(Path(model))
    from casemate import model_registry

    found = model_registry.registered_model(STORE, text.removeprefix(SCHEME))
    files = sorted(found.folder.glob("*.onnx"))
    if len(files) != 1:
        raise UserError(f"{text} holds {len(files)} .onnx files; needed is one, as 'dvc repro' registers it")
    recorded = found.tags.get(model_registry.MD5)
    if recorded is None:
        raise UserError(f"{text} was not registered by the pipeline: no MD5 was recorded to hold its file against")
    if hashlib.md5(files[0].read_bytes(), usedforsecurity=False).hexdigest() != recorded:
        raise UserError(f"{files[0]} is not the file that was registered as {text}: it was changed since")
    told = found.tags.get(model_registry.CARD)
    card = None if told is None else cards.parse(told, f"the card of {text}")
    return Source(files[0], found.name, found.version, card)


def load(model: Path | str, device: Device = "auto", *, threads: int | None = None) -> Predictor:
    """A model ready to predict: an .onnx file, a released folder, models:/NAME@ALIAS or models:/NAME/VERSION.

    device: "auto" takes a GPU where there is a usable one; `provider` of the result says what runs it. threads: of
    the CPU, by default all. A file is held against its card by SHA-256, be that beside it or in the registry, and a
    registered one against its recorded MD5. Raises UserError if there is no such model, it cannot be used here, or
    its file was changed.
    """
    return resolve(model).open(device, threads=threads)
