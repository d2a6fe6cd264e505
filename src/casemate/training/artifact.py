"""What training leaves behind: weights.safetensors and card.json. No pickle; every file is checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from casemate import registry
from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.checkpoint import file_hash, write_bytes
from casemate.training.recipe import Recipe

if TYPE_CHECKING:
    from casemate.defenses.base import Defense
    from casemate.system import System
    from casemate.training.loop import Trained

SCHEMA = 1
WEIGHTS, CARD = "weights.safetensors", "card.json"
SHARED_CODE = (
    "casemate.attacks.ascent", "casemate.defenses.base", "casemate.trainable", "casemate.training.averages",
    "casemate.training.awp", "casemate.training.loop", "casemate.training.recipe", "casemate.training.rehearsal",
    "casemate.training.state", "casemate.training.updates",
)  # fmt: skip
Card = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


class _Normalise(BaseModel):
    mean: list[float]
    std: list[float]


class _Network(BaseModel):
    name: str
    options: dict[str, Any]
    normalise: _Normalise | None


class _Method(BaseModel):
    method: str
    options: dict[str, Any]


class _Threat(BaseModel):
    norm: Literal["linf", "l2"]
    radius: float = Field(ge=0, allow_inf_nan=False)


class _Weights(BaseModel):
    """The part of any card that says which tensors belong to it."""

    modules: list[str]
    weights_sha256: str


class _Read(_Weights):
    """The part of a defense's card that rebuilds a system; the rest is for people and reports."""

    dataset: str
    classes: list[str] = Field(min_length=2)
    input_shape: tuple[int, int, int]
    network: _Network
    defense: _Method
    recipe: dict[str, Any]
    threat: _Threat
    seed: int


def make_card(
    *,
    dataset: str,
    data_checksum: str,
    classes: Sequence[str],
    input_shape: tuple[int, int, int],
    network: str,
    network_options: Mapping[str, Any],
    normalise: tuple[Sequence[float], Sequence[float]] | None,
    defense: str,
    defense_options: Mapping[str, Any],
    recipe: Recipe,
    threat: ThreatModel,
    seed: int,
    budget: float,
    trained: Trained,
) -> Card:
    """The card of a trained defense. `recipe` is the one that was run, already scaled by `budget`.

    Options that were left out are written with the defaults they had.
    Holds nothing that changes between two equal runs: no date, no duration, no device.
    """
    by_epoch = {row["epoch"]: row for row in trained.curves}
    modules = (registry.location("defense", defense)[0], registry.location("network", network)[0], *SHARED_CODE)
    return {
        "schema": SCHEMA,
        "dataset": dataset,
        "data_checksum": data_checksum,
        "classes": list(classes),
        "input_shape": list(input_shape),
        "network": {
            "name": network,
            "options": _complete("network", network, network_options),
            "normalise": None if normalise is None else dict(zip(("mean", "std"), map(list, normalise), strict=True)),
        },
        "defense": {"method": defense, "options": _complete("defense", defense, defense_options)},
        "recipe": recipe.as_dict(),
        "threat": {"norm": threat.norm, "radius": threat.radius, "text": str(threat)},
        "seed": seed,
        "budget": budget,
        "effective_epochs": trained.epochs,
        "steps": trained.steps,
        "chosen_epoch": trained.chosen_epoch,
        "precision": trained.precision,
        "parameters": {name: sum(p.numel() for p in m.parameters()) for name, m in trained.modules.items()},
        "metrics": {"chosen": by_epoch.get(trained.chosen_epoch, {}), "last": trained.curves[-1]},
        "code": {module: registry.code_hash(module) for module in modules},
    }


def _complete(kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a registered class with its defaults: what a later version's defaults must not change."""
    filled: dict[str, Any] = asdict(registry.resolve(kind, name)(**options))
    return filled


def save_artifact(folder: Path, modules: Mapping[str, nn.Module], card: Mapping[str, Any]) -> None:
    """Write weights.safetensors (`module/tensor` names), then card.json, which carries the hash of the weights.

    `card` is any JSON-able mapping; only one from `make_card` rebuilds a system.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}/{key}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    data = save(tensors)
    written = {"schema": SCHEMA, **card, "modules": list(modules), "weights_sha256": hashlib.sha256(data).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, data)
    write_bytes(folder / CARD, (json.dumps(written, indent=1, allow_nan=False) + "\n").encode())


def load_artifact(folder: Path) -> tuple[dict[str, dict[str, Tensor]], Card]:
    """(tensors by module, card). Raises UserError, naming the file and the mend, if they are not a whole artifact."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = _read_card(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} does not exist; train that row again")
    if file_hash(weights) != card["weights_sha256"]:
        raise UserError(f"{weights} is not the file that {CARD} beside it describes; train that row again")
    try:
        flat = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} is not a safetensors file ({error}); train that row again") from None
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in card["modules"]}
    for path, tensor in flat.items():
        name, _, key = path.partition("/")
        if name not in tensors:
            raise UserError(f"{weights} has tensors of {name!r}, which {CARD} does not list; train that row again")
        tensors[name][key] = tensor
    return tensors, card


def load_modules(folder: Path, device: torch.device | str = "cpu") -> tuple[Defense, dict[str, nn.Module], Card]:
    """(defense, its trained modules in eval mode, card), rebuilt from the card and strictly filled."""
    tensors, card = load_artifact(folder)
    read = _checked(_Read, card, folder / CARD)
    try:
        defense: Defense = registry.resolve("defense", read.defense.method)(**read.defense.options)
        with torch.random.fork_rng([]):
            modules = defense.modules(_task(read))
    except (ValidationError, UserError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{folder / CARD} does not fit this version ({first}); train that row again") from None
    if modules.keys() != tensors.keys():
        raise UserError(
            f"{folder / WEIGHTS} has modules {', '.join(tensors)} where {read.defense.method} "
            f"needs {', '.join(modules)}; train that row again"
        )
    for name, module in modules.items():
        _fill(module, tensors[name], f"{folder / WEIGHTS}: module {name}")
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.eval()
    return defense, modules, card


def with_classifier(task: Task, folder: Path) -> tuple[Task, dict[str, Any]]:
    """The task with its fresh networks holding the classifier of a trained artifact, and what a card says of that.

    Raises UserError if that classifier is another network than the task's.
    """
    tensors, card = load_artifact(folder)
    if "classifier" not in tensors:
        raise UserError(f"{folder / WEIGHTS} has no classifier to start from")

    def begun() -> nn.Module:
        network = task.network()
        _fill(network, tensors["classifier"], f"{folder / WEIGHTS}: module classifier")
        return network

    begun()
    start = {"row": folder.name, "weights_sha256": card["weights_sha256"], "epochs": card.get("effective_epochs")}
    return replace(task, network=begun), {"start": start}


def load_system(folder: Path, mode: str | None = None, device: torch.device | str = "cpu") -> System:
    """The trained system in an inference mode, the primary one by default.

    Its name is the folder's, followed by `+mode` for a mode that is not the primary one.
    """
    defense, modules, card = load_modules(folder, device)
    primary = defense.inference_modes[0]
    system = defense.system(
        modules,
        mode or primary,
        input_shape=tuple(card["input_shape"]),
        num_classes=len(card["classes"]),
        threat=ThreatModel(card["threat"]["norm"], card["threat"]["radius"]),
    )
    system.name = folder.name if mode in (None, primary) else f"{folder.name}+{mode}"
    return system


def _read_card(folder: Path) -> Card:
    path = folder / CARD
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder of a trained row, or train it first") from None
    except ValueError:
        raise UserError(
            f"{path} is not JSON; it is not a card of casemate, or is damaged: train that row again"
        ) from None
    schema = card.get("schema") if isinstance(card, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; train that row again")
    checked: Card = card
    _checked(_Weights, checked, path)
    return checked


def _checked(kind: type[Model], card: Card, path: Path) -> Model:
    try:
        return kind(**card)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; train that row again") from None


def _task(read: _Read) -> Task:
    wanted, classes = read.network, len(read.classes)
    begins: frozenset[str] = getattr(registry.resolve("network", wanted.name), "initial", frozenset())
    options = {key: value for key, value in wanted.options.items() if key not in begins}  # its weights are trained

    def network() -> nn.Module:
        layer = None if wanted.normalise is None else Normalise(wanted.normalise.mean, wanted.normalise.std)
        return build_network(
            wanted.name, input_shape=read.input_shape, num_classes=classes, normalise=layer, **options
        )

    return Task(
        input_shape=read.input_shape,
        num_classes=classes,
        threat=ThreatModel(read.threat.norm, read.threat.radius),
        network=network,
        player=Recipe(**read.recipe).player,
        seed=read.seed,
    )


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Strict `load_state_dict` with a one-line error."""
    own = module.state_dict()
    for key in own:
        if key not in tensors:
            raise UserError(f"{what} has no tensor {key!r}; it is of another network: train that row again")
        if own[key].shape != tensors[key].shape:
            raise UserError(
                f"{what}: {key} has shape {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}; "
                "it is of another network: train that row again"
            )
    extra = sorted(tensors.keys() - own.keys())
    if extra:
        raise UserError(f"{what} has an unknown tensor {extra[0]!r}; it is of another network: train that row again")
    module.load_state_dict(dict(tensors))
