"""Bring your own: from what a user names on the command line to a system, its images and its classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from casemate import registry
from casemate.data import build_dataset, fetch_dataset
from casemate.data.base import Images
from casemate.errors import UserError, near, shorten
from casemate.system import System

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
RELEASED = "casemate-card/"
"""How the schema of a released folder's card begins."""
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Brought:
    """A model and the images to attack it on."""

    system: System
    images: Images
    classes: tuple[str, ...]
    network: str
    notes: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)

    def check_attacks(self, names: Iterable[str]) -> None:
        """Raise UserError if none of these registered attacks can be run: there would be no figure at the end.

        A model without gradient meets random corners all the same, and one with attacks of its own meets those.
        """
        lacking = {name: registry.resolve("attack", name).needs - self.system.offers for name in names}
        if all(lacking.values()) and "gradient" in self.system.offers and not self.system.adaptive_attacks():
            told = ", ".join(f"{name} needs {' and '.join(sorted(what))}" for name, what in lacking.items())
            raise UserError(f"--attacks: none of them can be run on this model ({told}); choose others")


@dataclass(frozen=True)
class Request:
    """What the user named. `shape` is (C, H, W), needed where neither model nor data say it."""

    model: str
    data: str
    data_root: Path
    device: str = "cpu"
    network: str | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    normalise: bool = False
    shape: Shape | None = None

    def load(self) -> Brought:
        """The model and its images. Raises UserError, naming the option and the mend."""
        if self.data not in registry.TABLES["dataset"] and not Path(self.data).is_dir():
            raise UserError(
                f"--data {self.data}: no such dataset or folder{near(self.data, registry.names('dataset'))}"
            )
        path = Path(self.model)
        checkpoint = not path.is_dir() and path.suffix in CHECKPOINTS
        self._refuse_unused(checkpoint, checkpoint or (path.suffix != ".onnx" and ":" in self.model))
        if is_released(path):
            from casemate.deploy.card import model_path, verify

            verify(path)
            return self._onnx(model_path(path))
        if path.is_dir():
            return self._trained(path)
        if path.suffix == ".onnx":
            return self._onnx(path)
        if checkpoint:
            return self._checkpoint(path)
        if ":" in self.model:
            return self._callable()
        raise UserError(
            f"{self.model} is no model: give file.py:callable, package.module:callable, a checkpoint "
            f"({', '.join(CHECKPOINTS)}) with --network, the folder of a trained row or a released model, or an "
            "existing .onnx file"
        )

    def _refuse_unused(self, checkpoint: bool, shapeless: bool) -> None:
        """What would change nothing is a misunderstanding. `shapeless`: the model does not say what it takes."""
        given = {"--network": self.network, "--network-option": self.network_options, "--normalise": self.normalise}
        for option, value in given.items():
            if value and not checkpoint:
                raise UserError(f"{option} is for a checkpoint ({', '.join(CHECKPOINTS)}), and {self.model} is none")
        if self.shape is not None and self.data in registry.TABLES["dataset"]:
            raise UserError(f"--shape: dataset {self.data} says the shape itself; leave the option out")
        if self.shape is not None and not shapeless:
            raise UserError(f"--shape: {self.model} says the shape itself; leave the option out")

    def _trained(self, folder: Path) -> Brought:
        from casemate.training.artifact import load_artifact, load_system

        system = load_system(folder, device=self.device)
        card = load_artifact(folder)[1]
        images, classes, notes = self._images(system.input_shape, tuple(card["classes"]))
        return Brought(system, images, classes, card["network"]["name"], notes, card)

    def _onnx(self, path: Path) -> Brought:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        from casemate.deploy.onnx_system import OnnxSystem

        system = OnnxSystem(path, "cuda" if self.device == "cuda" else "cpu")
        return self._with_images(system, "onnx", system.classes)

    def _checkpoint(self, path: Path) -> Brought:
        from casemate.evaluation.external import load_checkpoint
        from casemate.networks.base import Normalise

        if self.network is None:
            raise UserError(f"{path}: name the network it is of with --network; see 'casemate list networks'")
        check_network(self.network, self.network_options)
        images, classes, notes = self._images(self._shape(), None)
        layer = None
        if self.normalise:
            if self.data not in registry.TABLES["dataset"]:
                raise UserError("--normalise uses a dataset's mean and deviation; --data is a folder")
            dataset = build_dataset(self.data)
            layer = Normalise(dataset.mean, dataset.std)
        system = load_checkpoint(
            path, self.network, options=self.network_options, input_shape=self._shape(), num_classes=len(classes),
            normalise=layer, device=self.device,
        )  # fmt: skip
        return Brought(system, images, classes, self.network, notes)

    def _callable(self) -> Brought:
        from casemate.evaluation.external import load_callable

        system = load_callable(self.model, input_shape=self._shape(), device=self.device)
        return self._with_images(system, "callable")

    def _with_images(self, system: System, network: str, names: tuple[str, ...] | None = None) -> Brought:
        images, classes, notes = self._images(system.input_shape, names)
        if len(classes) != system.num_classes:
            mend = "its classes must be those of the data, in the same order"
            if self.data not in registry.TABLES["dataset"]:
                mend += "; a class without pictures needs an empty sub-folder of its name"
            raise UserError(
                f"{self.model} tells {system.num_classes} classes apart and {self.data} has {len(classes)} "
                f"({shorten(', '.join(classes))}): {mend}"
            )
        return Brought(system, images, classes, network, notes)

    # --- images ---------------------------------------------------------------------------------------------

    def _shape(self) -> Shape:
        if self.data in registry.TABLES["dataset"]:
            return build_dataset(self.data).input_shape
        if self.shape is None:
            raise UserError(f"--data {self.data} is a folder: give the shape that the model takes with --shape C,H,W")
        return self.shape

    def _images(
        self, shape: Shape, classes: tuple[str, ...] | None
    ) -> tuple[Images, tuple[str, ...], tuple[str, ...]]:
        """(test images of that shape, class names, notes). `classes` is their order, where the model says it."""
        if self.data in registry.TABLES["dataset"]:
            dataset = build_dataset(self.data)
            if dataset.input_shape != shape:
                raise UserError(f"{self.model} takes images {shape}, and {self.data} has {dataset.input_shape}")
            if classes is not None and classes != tuple(dataset.classes):
                raise UserError(f"{self.model} was trained on other classes than those of {self.data}")
            fetch_dataset(self.data, self.data_root)
            return dataset.load(self.data_root / self.data, "test"), tuple(dataset.classes), ()
        from casemate.data.folder import read_folder

        read = read_folder(Path(self.data), shape, classes)
        notes = [f"{len(read.images):,} pictures read as {read.conversion}"]
        if read.unreadable:
            notes.append(f"{len(read.unreadable):,} files left out, the first: {read.unreadable[0]}")
        return read.images, read.classes, tuple(notes)


def is_released(folder: Path) -> bool:
    """Whether it is what the release stage hands out: an .onnx file with its card, and no weights to train on."""
    try:
        card = json.loads((folder / "card.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and str(card.get("schema")).startswith(RELEASED)


def load_source(folder: Path, device: str) -> System:
    """The trained row that examples are crafted on, which takes its gradients."""
    from casemate.training.artifact import load_system

    if is_released(folder):
        raise UserError(
            f"--source {folder}: a released folder, whose file offers no gradient: give models/PROFILE/trained/ROW"
        )
    return load_system(folder, device=device)


def check_network(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown network, and for an option that it has not or that is out of range."""
    known = registry.schema("network", name).model_fields
    for key in options:
        if key not in known:
            raise UserError(f"--network-option: network {name} has no option {key!r}" + _hint(key, known))
    try:
        registry.check("network", name, dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise UserError(f"--network-option: network {name}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise UserError(f"--network-option: network {name}: {error}") from None


def _hint(key: str, known: Mapping[str, Any]) -> str:
    return near(key, known) if known else "; it has none"
