"""The system under attack: what would be deployed, and the faces of it that an attacker can use.

A `System` is a classifier with whatever stands before or behind it at inference. Its `views()` are the
differentiable faces it shows; `adaptive_attacks()` are procedures that no view can express.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

Offer = Literal["gradient", "scores", "labels"]
REJECT = -1


@dataclass(frozen=True)
class View:
    """A face of a system: `logits(x)` with or without gradients.

    `exact`: the arg max of `logits` IS the system's decision, so an attack may stop at its first success.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    exact: bool
    offers: frozenset[Offer]
    passes: tuple[int, int] = (1, 1)
    """(forwards, backwards) of the classifier that one logits-and-gradient evaluation costs."""
    decisions: Callable[[Tensor], Tensor] | None = None
    """The deployed system's decisions, where they are not the arg max of `logits`; set for every attack."""

    def decide(self, x: Tensor) -> Tensor:
        """(N,) labels that the deployed system answers, whatever this face shows; -1 where it rejects. One query,
        which needs no more than labels."""
        with torch.no_grad():
            return self.logits(x).argmax(1) if self.decisions is None else self.decisions(x)


class Purification(Protocol):
    """A test-time transformation of the input, such as IMT."""

    def __call__(self, x: Tensor) -> Tensor:
        """The purified image, same shape, no gradient attached; deterministic."""
        ...

    def score(self, x: Tensor) -> Tensor:
        """(N,) in [0, 1]: how much the input looks clean."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies it besides weights: JSON-able parameters."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Modules whose tensors take part, the classifier excepted."""
        ...

    passes: tuple[int, int]


class System(ABC):
    """What is attacked. `logits` and `decide` take images in [0, 1] (N x C x H x W)."""

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    offers: frozenset[Offer]
    stochastic: bool = False
    changes_inference: bool = False
    """True if inference is more than the classifier's forward pass: then the views must be adaptive."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Scores of the deployed system (N x C), purification included; no gradient is promised."""

    def decide(self, x: Tensor) -> Tensor:
        """(N,) decided labels; -1 where the system rejects the input."""
        with torch.no_grad():
            return self.logits(x).argmax(1)

    @abstractmethod
    def views(self) -> dict[str, View]:
        """Every face by name. `static` is the classifier alone; `adaptive` the strictest one. Both always exist
        for a system that offers gradients; for a plain classifier they are the same."""

    def adaptive_attacks(self) -> dict[str, Any]:
        """Procedures that no view can express, by name: attack objects. None by default."""
        return {}

    def frozen(self) -> AbstractContextManager[None]:
        """While open: parameters need no gradient and every module is in eval mode; restored after."""
        return nullcontext()

    @abstractmethod
    def hash(self) -> str:
        """Identifies every tensor that decides, and the inference specification."""


class TorchSystem(System):
    """A PyTorch classifier, alone or behind a purification. Runs in float32 on the classifier's device."""

    def __init__(
        self, classifier: nn.Module, *, input_shape: tuple[int, int, int], num_classes: int,
        purification: Purification | None = None, name: str = "classifier",
    ) -> None:  # fmt: skip
        self.classifier, self.purification, self.name = classifier, purification, name
        self.input_shape, self.num_classes = input_shape, num_classes
        self.offers = frozenset({"gradient", "scores", "labels"})
        self.changes_inference = purification is not None

    @property
    def device(self) -> torch.device:
        found = next(self.classifier.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(x if self.purification is None else self.purification(x))
        return out

    def views(self) -> dict[str, View]:
        plain = View("static", self.classifier, self.purification is None, self.offers)
        if self.purification is None:
            return {"static": plain, "adaptive": View("adaptive", self.classifier, True, self.offers)}
        forwards, backwards = self.purification.passes
        bpda = View("adaptive", self._identity_backward, True, self.offers, (1 + forwards, 1 + backwards))
        return {"static": plain, "adaptive": bpda}

    def _identity_backward(self, x: Tensor) -> Tensor:
        """f(IMT(x)), its gradient taken as if the purification were x + constant (ATTACKS 9.4 A1)."""
        assert self.purification is not None
        # x - x.detach() is exactly zero, so the value is bit for bit what `logits` gives.
        out: Tensor = self.classifier(self.purification(x.detach()) + (x - x.detach()))
        return out

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        modules = [self.classifier, *(self.purification.modules if self.purification else ())]
        with frozen(*modules):
            yield

    def frozen(self) -> AbstractContextManager[None]:
        return self._frozen()

    def hash(self) -> str:
        digest = hashlib.sha256()
        modules = [self.classifier, *(self.purification.modules if self.purification else ())]
        for module in modules:
            digest.update(type(module).__name__.encode())
            for key, value in sorted(module.state_dict().items()):
                digest.update(key.encode() + str(tuple(value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        if self.purification is not None:
            digest.update(repr(sorted(self.purification.spec.items())).encode())
        return digest.hexdigest()[:16]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter gradients; every flag and mode is put back as it was."""
    flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    modes = [(m, m.training) for root in modules for m in root.modules()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for m in modules:
            m.eval()
        yield
    finally:
        for p, needed in flags:
            p.requires_grad_(needed)
        for m, training in modes:
            m.training = training
