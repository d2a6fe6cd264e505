"""The system under attack: what would be deployed, and the faces of it that an attacker can use.

A `System` is a classifier with whatever stands before or behind it at inference. Its `views()` are the
differentiable faces it shows; `adaptive_attacks()` are procedures that no view can express.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from casemate.seeding import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

Offer = Literal["gradient", "scores", "labels", "purification", "critic", "band", "detector"]
"""What an attacker is given: answers of the system, and parts of its inference that a white-box one may look into."""
ANSWERS: frozenset[Offer] = frozenset({"gradient", "scores", "labels"})
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
    read: Callable[[Tensor, Tensor], Tensor] | None = None
    """(logits, x) -> decisions (N,) of an exact face whose logits are not a plain arg max (`labels` uses it)."""
    system: System | None = field(default=None, repr=False, compare=False)
    """Whose face it is: an attack that knows the defense looks up its parts and its other faces here."""

    def decide(self, x: Tensor) -> Tensor:
        """(N,) labels that the deployed system answers, whatever this face shows; -1 where it rejects. One query,
        which needs no more than labels."""
        with torch.no_grad():
            return self.logits(x).argmax(1) if self.decisions is None else self.decisions(x)

    def labels(self, logits: Tensor, x: Tensor) -> Tensor:
        """(N,) decisions on `x`, of which this face has just answered `logits`; the system's own if it is exact."""
        return logits.argmax(1) if self.read is None else self.read(logits, x)


class Purification(ABC):
    """A test-time transformation of the input, such as IMT. It ships the attacks that account for it: with neither
    an adaptive view nor a procedure, the system behind it is "not evaluated"."""

    passes: tuple[int, int]
    """(forwards, backwards) of the classifier that one purification costs."""
    offers: frozenset[Offer] = frozenset({"purification"})
    """Which of its parts an attacker who knows it may look into."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The purified image, same shape, no gradient attached; deterministic."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """(N,) in [0, 1]: how much the input looks clean."""

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What identifies it besides weights: JSON-able parameters."""

    @property
    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """Modules whose tensors take part, the classifier excepted."""

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(purified image, what was added to `x` before anything was cut to [0, 1]), without gradients."""
        purified = self(x)
        return purified, purified - x.detach()

    def views(self, classifier: Callable[[Tensor], Tensor]) -> dict[str, View]:
        """Differentiable faces of the classifier behind it, the strictest named "adaptive"; none by default."""
        return {}

    def adaptive_attacks(self) -> dict[str, Any]:
        """Procedures that account for it and that no view expresses, by name; none by default."""
        return {}


class Detector(Protocol):
    """Tells natural images from adversarial ones; a system that has one rejects what it flags."""

    def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(d (N,), class logits N x C), differentiable: the image is flagged where d is above 0."""
        ...

    passes: tuple[int, int]
    """(forwards, backwards) of the classifier that one differentiated readout costs."""

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies it besides weights: JSON-able parameters, its threshold among them."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Modules whose tensors take part, the classifier excepted."""
        ...


class System(ABC):
    """What is attacked. `logits` and `decide` take images in [0, 1] (N x C x H x W)."""

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    offers: frozenset[Offer]
    stochastic: bool = False
    changes_inference: bool = False
    """True if inference is more than the classifier's forward pass: then the views must be adaptive."""
    purification: Purification | None = None
    detector: Detector | None = None
    draws: int = 0
    """Of a stochastic system: how many draws of its noise an attack's gradient averages. 0: it cannot say."""

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

    def decision_passes(self) -> tuple[int, int]:
        """(forwards, backwards) of the classifier that one `decide` costs."""
        views = self.views()
        forwards, backwards = views.get("adaptive", next(iter(views.values()))).passes
        return forwards, max(backwards - 1, 0)

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
        self.offers = ANSWERS
        if purification is not None:
            self.offers |= purification.offers
        self.changes_inference = purification is not None

    @property
    def device(self) -> torch.device:
        found = next(self.classifier.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(x if self.purification is None else self.purification(x))
        return out

    def views(self) -> dict[str, View]:
        plain = View("static", self.classifier, self.purification is None, self.offers, system=self)
        if self.purification is None:
            return {"static": plain, "adaptive": replace(plain, name="adaptive")}
        own = self.purification.views(self.classifier)
        return {"static": plain} | {name: replace(v, offers=self.offers, system=self) for name, v in own.items()}

    def adaptive_attacks(self) -> dict[str, Any]:
        return {} if self.purification is None else self.purification.adaptive_attacks()

    def _modules(self) -> list[nn.Module]:
        """Everything whose tensors decide."""
        return [self.classifier, *(self.purification.modules if self.purification else ())]

    def frozen(self) -> AbstractContextManager[None]:
        return frozen(*self._modules())

    def hash(self) -> str:
        digest = hashlib.sha256()
        for module in self._modules():
            digest.update(type(module).__name__.encode())
            for key, value in sorted(module.state_dict().items()):
                digest.update(key.encode() + str(tuple(value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        if self.purification is not None:
            digest.update(repr(sorted(self.purification.spec.items())).encode())
        return digest.hexdigest()[:16]


# --- faces of a classifier behind a purification -------------------------------------------------------------


def identity_backward(classifier: Callable[[Tensor], Tensor], purification: Purification) -> View:
    """ "adaptive": f(T(x)), its gradient taken as if T were x + constant (BPDA, Athalye et al. 2018). Exact almost
    everywhere where T moves along signs, and the logits are bit for bit the deployed ones."""

    def logits(x: Tensor) -> Tensor:
        # x - x.detach() is exactly zero, so the value is bit for bit what `System.logits` gives.
        return classifier(purification(x.detach()) + (x - x.detach()))

    forwards, backwards = purification.passes
    return View("adaptive", logits, True, purification.offers, (1 + forwards, 1 + backwards))


def noise_averaged(view: View, draws: int, noise: float, seed: int = 0) -> View:
    """ "averaged": the answers of `view`, with the mean of its Jacobians at x and at `draws` - 1 points around it.

    A direction that flips nearby is seen from both sides. The deviations N(0, noise^2), in pixel units, are the same
    for every image and every call, so the face is deterministic and no image depends on another.
    """

    def logits(x: Tensor) -> Tensor:
        out = view.logits(x)
        if not torch.is_grad_enabled():
            return out
        total = out
        for number in range(1, draws):
            rng = generator(seed, "noise averaged", number)
            total = total + view.logits(x + noise * torch.randn((1, *x.shape[1:]), generator=rng).to(x))
        mean = total / draws
        return out.detach() + (mean - mean.detach())

    forwards, backwards = view.passes
    return replace(view, name="averaged", logits=logits, passes=(draws * forwards, draws * backwards))


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
