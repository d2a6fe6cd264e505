"""The classifier contract: `forward = head(features(x))`, images in [0, 1], normalisation a layer inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.networks.quick import quicken
from casemate.registry import resolve

Shape = tuple[int, int, int]


class Normalise(nn.Module):
    """(x - mean) / std per channel; the identity with mean 0, std 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """Base of every network. Subclasses fill `body`, an ordered dict of named layers ending in `head`.

    `layers` are the names that `taps` and `split` accept, in order, `head` excluded. The forward pass is
    `normalise`, then the layers in order, then `head`; whatever a layer needs beyond that lives inside it.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        num_classes: int,
        layers: Mapping[str, nn.Module],
        head: nn.Module,
        normalise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_shape, self.num_classes = input_shape, num_classes
        self.normalise = normalise or nn.Identity()
        self.body = nn.ModuleDict(layers)
        self.head = head
        quicken(self)

    @property
    def layers(self) -> list[str]:
        """Names of the layers in forward order."""
        return list(self.body)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate representation (N x d) that `head` reads."""
        x = self.normalise(x)
        for layer in self.body.values():
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def taps(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the named layers (and `head`), in one forward pass."""
        unknown = set(names) - {*self.layers, "head"}
        if unknown:
            raise UserError(f"no layer {sorted(unknown)[0]!r}; layers: {', '.join([*self.layers, 'head'])}")
        seen: dict[str, Tensor] = {}
        x = self.normalise(x)
        for name, layer in self.body.items():
            x = layer(x)
            if name in names:
                seen[name] = x
        if "head" in names:
            seen["head"] = self.head(x)
        return seen

    def split(self, layer: str) -> tuple[nn.Module, nn.Module]:
        """(lower, upper): lower ends with `layer`, upper gives the logits; `upper(lower(x)) == forward(x)`."""
        if layer not in self.body:
            raise UserError(f"no layer {layer!r}; layers: {', '.join(self.layers)}")
        at = self.layers.index(layer) + 1
        parts = list(self.body.values())
        return nn.Sequential(self.normalise, *parts[:at]), nn.Sequential(*parts[at:], self.head)


class NetworkSpec(ABC):
    """Base of every registered network: a `@spec` class whose fields are the architecture's options."""

    @abstractmethod
    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        """A freshly initialised network. Raises UserError if it cannot take images of that shape (C, H, W)."""


def build_network(
    name: str, *, input_shape: Shape, num_classes: int, normalise: Normalise | None = None, **options: Any
) -> Classifier:
    """The registered network of that name, with its options checked."""
    made: NetworkSpec = resolve("network", name)(**options)
    return made.build(input_shape, num_classes, normalise)


def require_shape(network: str, shape: Shape, accepted: Shape) -> None:
    """Raise UserError unless `shape` (C, H, W) is the only one the network takes."""
    if tuple(shape) != accepted:
        raise UserError(
            f"network {network} takes {_text(accepted)} images, not {_text(shape)}: choose another network"
        )


def require_divisible(network: str, shape: Shape, divisor: int) -> None:
    """Raise UserError unless height and width are multiples of `divisor`."""
    if shape[1] % divisor or shape[2] % divisor:
        raise UserError(
            f"network {network} takes images whose height and width are multiples of {divisor}, not {_text(shape)}"
        )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def count_parameters(module: nn.Module) -> int:
    """Trainable parameters; buffers do not count."""
    return sum(p.numel() for p in module.parameters())
