"""Weights that a network may begin with: torchvision's own, or a file known by its checksum. No pickled code runs."""

from __future__ import annotations

import hashlib
import pickle
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

from casemate.errors import UserError, first_line
from casemate.fields import Natural, Text, spec
from casemate.networks.base import NetworkSpec, Normalise

FOLDER = Path("data/weights")
"""Where published files are looked for, and put."""


@spec
class Weighted(NetworkSpec):
    """Base of networks that may begin with torchvision's weights; without `weights` they begin at random.

    With weights the first layer is the normaliser that these were trained with, not the data set's. A trained
    artifact is read without them: the fields named by `initial` say where training began, and nothing else.
    """

    initial: ClassVar[frozenset[str]] = frozenset({"weights", "sha256"})

    weights: Text | None = None
    """"official", fetched unless it is in data/weights; or a file, .safetensors or one of torch.save with tensors
    alone, in torchvision's names."""
    sha256: Text | None = None
    """Of that file."""

    @abstractmethod
    def published(self) -> str:
        """Where the official file is, whose name ends with the beginning of its sha256."""

    def _read(self) -> dict[str, Tensor]:
        """The tensors of `weights`. Raises UserError if they cannot be had."""
        if self.weights == "official":
            path = fetched(self.published())
            return read_tensors(path, path.stem.rpartition("-")[2])
        path = Path(str(self.weights))
        if self.sha256 is None or len(self.sha256) != 64:
            raise UserError(f"network {_name(self)}: weights from a file need its sha256, 64 digits")
        return read_tensors(path, self.sha256)

    def _require_weights(self, *others: str) -> None:
        """Raise UserError where fields that say something of weights are set, and there are none."""
        if any(getattr(self, name) for name in others):
            raise UserError(
                f"network {_name(self)}: {' and '.join(others)} say something of weights, and there are none"
            )

    def _foreign(self, tensor: str) -> UserError:
        return UserError(f"network {_name(self)}: {self.weights} is of another network (tensor {tensor})")


@spec
class Pretrained(Weighted):
    """A network of torchvision's, with its head."""

    initial: ClassVar[frozenset[str]] = Weighted.initial | {"rows"}
    url: ClassVar[str]
    statistics: ClassVar[tuple[Sequence[float], Sequence[float]]]
    """Mean and standard deviation that its input was normalised with."""

    rows: tuple[Natural, ...] = ()
    """Rows of the weights' head that become this one's classes, in order: a 10-class classifier out of a 1000-class
    one without training. Without them a head of another size begins at random."""

    def published(self) -> str:
        return self.url

    def begin(self, made: nn.Module, num_classes: int, normalise: Normalise | None) -> Normalise | None:
        """Fill `made`, whose head is `fc`, and give the normaliser to use. Raises UserError if anything is wrong."""
        if self.weights is None:
            self._require_weights("rows", "sha256")
            return normalise
        if normalise is None:
            raise UserError(f"network {_name(self)}: its weights need a normaliser: set normalise to true")
        tensors = {k: v for k, v in self._read().items() if not k.startswith("AuxLogits.")}
        own = made.state_dict()
        if self.rows:
            self._choose_rows(tensors, num_classes)
        elif "fc.weight" in tensors and len(tensors["fc.weight"]) != num_classes:
            tensors |= {key: own[key] for key in ("fc.weight", "fc.bias")}
        odd = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
        if odd:
            raise self._foreign(odd[0])
        made.load_state_dict(tensors)
        return Normalise(*self.statistics)

    def _choose_rows(self, tensors: dict[str, Tensor], num_classes: int) -> None:
        there = len(tensors.get("fc.weight", ()))
        if len(self.rows) != num_classes or max(self.rows) >= there:
            raise UserError(
                f"network {_name(self)}: rows must name {num_classes} of the {there} rows of the weights' head, "
                f"not {', '.join(map(str, self.rows))}"
            )
        for key in ("fc.weight", "fc.bias"):
            tensors[key] = tensors[key][list(self.rows)]


def fetched(url: str) -> Path:
    """The published file, from data/weights, else by download into it. Raises UserError with what to do instead."""
    path = FOLDER / url.rpartition("/")[2]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
    except (URLError, OSError, RuntimeError) as error:  # the last: its checksum
        raise UserError(
            f"{url} could not be had ({' '.join(str(error).split())}): bring it as {path}, name a file by weights "
            "and sha256, or leave weights out to begin at random"
        ) from None
    return path


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 begins so; `state_dict` inside and `module.` before names are peeled off.

    Raises UserError if it is not there, is another file, or holds anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist: bring the weights there, or leave weights out to begin at random")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256.lower()):
        raise UserError(f"{path} has sha256 {found}, not {sha256}: it is another file, or damaged")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} holds no weights ({first_line(error)})") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no weights (anything but named tensors)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def out_of_place(module: nn.Module) -> None:
    """No ReLU overwrites what it read: a hooked or tapped tensor must stay what it was."""
    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False


def _name(network: NetworkSpec) -> str:
    return type(network).__name__
