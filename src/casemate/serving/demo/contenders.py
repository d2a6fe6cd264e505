"""Who stands against whom: the standard model of a profile and its robust one, each as the file that is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from casemate.deploy.card import MODEL
from casemate.deploy.predict import Predictor
from casemate.deploy.session import Device
from casemate.errors import UserError, near
from casemate.serving.service import Tested, tested

if TYPE_CHECKING:
    from casemate.system import System

STANDARD = "standard"
CHAMPION = "champion"


@dataclass(frozen=True)
class Reading:
    """What a model says of one image. top: (class, probability), the most probable first."""

    label: int
    top: tuple[tuple[str, float], ...]
    score: float | None


@dataclass(frozen=True)
class Contender:
    """title: for people. predictor: the served file. trained: the folder of its PyTorch model, if it is there."""

    title: str
    row: str
    predictor: Predictor
    trained: Path | None
    mode: str | None

    @property
    def tested(self) -> Tested | None:
        return tested(self.predictor)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.predictor.model.input.shape

    def read(self, image: np.ndarray) -> Reading:
        """What the served file says of an image, 1 x C x H x W in [0, 1]."""
        found = self.predictor.predict(image)
        order = np.argsort(-found.probabilities[0], kind="stable")[:3]
        top = tuple((self.predictor.classes[k], float(found.probabilities[0, k])) for k in order)
        return Reading(
            int(found.labels[0]), top, None if found.manifold_score is None else float(found.manifold_score[0])
        )

    def victim(self) -> System:
        """What is attacked: the PyTorch model where it is there, which shows its gradient, else the file."""
        if self.trained is not None:
            from casemate.training.artifact import load_system

            return load_system(self.trained, self.mode and self.mode.partition(".")[0])  # float16 and the like
        from casemate.deploy.onnx_system import OnnxSystem

        return OnnxSystem(self.predictor.model.path, "cpu")


def find_contenders(folder: Path, robust: str | None = None, device: Device = "auto") -> list[Contender]:
    """The standard and the robust model of a profile's `models/` folder, those of them that are there.

    robust: a row, or row/mode; by default the champion. Raises UserError if there is no model at all.
    """
    champion = _champion(folder)
    if robust is None and champion is not None:
        chosen: list[Contender] = [_contender("Robust", folder, *champion, device)]
    else:
        rows = sorted({row for row, _, _ in _files(folder)})
        wanted = robust or next((row for row in rows if not _is_standard(folder, row)), None)
        chosen = [] if wanted is None else [_named("Robust", folder, wanted, device)]
    plain = next((row for row, _, _ in _files(folder) if _is_standard(folder, row)), None)
    if plain is not None:
        chosen.insert(0, _named("Standard", folder, plain, device))
    if not chosen:
        raise UserError(f"{folder} holds no exported model; 'dvc repro' makes them")
    shapes = {contender.shape for contender in chosen}
    if len(shapes) > 1:
        raise UserError(f"{folder}: the models take images of different shapes: {shapes}")
    return chosen


def _files(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(row, mode, file) of every released model, or where none was released of every exported one."""
    released = [(p.parent.parent.name, p.parent.name, p) for p in sorted(folder.glob(f"released/*/*/{MODEL}"))]
    yield from released or [(p.parent.name, p.stem, p) for p in sorted(folder.glob("exported/*/*.onnx"))]


def _champion(folder: Path) -> tuple[str, str, Path] | None:
    path = folder / CHAMPION / MODEL
    told: dict[str, Any] = {}
    if (folder / CHAMPION / "champion.json").is_file():
        told = json.loads((folder / CHAMPION / "champion.json").read_text())
    return (told.get("row", CHAMPION), told.get("mode", "plain"), path) if path.is_file() else None


def _named(title: str, folder: Path, wanted: str, device: Device) -> Contender:
    row, _, mode = wanted.partition("/")
    files = [found for found in _files(folder) if found[0] == row]
    if not files:
        raise UserError(f"no exported row {row!r} in {folder}{near(row, {found[0] for found in _files(folder)})}")
    fitting = [found for found in files if found[1] == (mode or _primary(folder, row) or found[1])]
    if not fitting:
        raise UserError(f"row {row!r} has no mode {mode!r}{near(mode, [found[1] for found in files])}")
    return _contender(title, folder, *fitting[0], device)


def _contender(title: str, folder: Path, row: str, mode: str, path: Path, device: Device) -> Contender:
    trained = folder / "trained" / row
    there = (trained / "card.json").is_file()
    return Contender(title, row, Predictor(path, device), trained if there else None, mode if there else None)


def _method(folder: Path, row: str) -> str | None:
    card = folder / "trained" / row / "card.json"
    if not card.is_file():
        return None
    method: str = json.loads(card.read_text())["defense"]["method"]
    return method


def _is_standard(folder: Path, row: str) -> bool:
    return (_method(folder, row) or row) == STANDARD


def _primary(folder: Path, row: str) -> str | None:
    """The mode in which the row's defense is meant to be used."""
    method = _method(folder, row)
    if method is None:
        return None
    from casemate.registry import resolve

    mode: str = resolve("defense", method).inference_modes[0]
    return mode
