"""Systems that answer with noise: attacked by the mean over draws, judged by a majority over draws of their own.

The noise of a draw is the same for every image of a batch (it is drawn for one and broadcast), so an image's answer
depends on no other image; each draw is seeded by what it is for, so that every result can be had again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.seeding import generator
from casemate.system import TorchSystem, View

Key: TypeAlias = tuple[object, ...] | None
"""What a noise layer's draw is for, or None for torch's global generator."""


class GaussianNoise(nn.Module):
    """x + sigma N(0, 1), in training and evaluation alike: the layer of random self-ensembles (Liu et al. 2018).

    Within `drawn` the noise is that of one draw, shared by the batch; outside, every call and image has its own from
    torch's global generator.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.key: Key = None

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None:
            return x + self.sigma * torch.randn_like(x)
        noise = torch.randn((1, *x.shape[1:]), generator=generator(*self.key))
        return x + self.sigma * noise.to(x)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


def noise_layers(model: nn.Module) -> list[GaussianNoise]:
    """Every noise layer of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, GaussianNoise)]


@contextmanager
def drawn(model: nn.Module, *use: object) -> Iterator[None]:
    """While open, every noise layer of `model` adds the noise of this use: the same at every call."""
    keys: list[Key] = [("noise", *use, number) for number in range(len(noise_layers(model)))]
    with keyed(model, keys):
        yield


def noise_keys(model: nn.Module) -> list[Key]:
    """What its noise layers draw by at the moment."""
    return [layer.key for layer in noise_layers(model)]


@contextmanager
def keyed(model: nn.Module, keys: Sequence[Key]) -> Iterator[None]:
    """While open, the noise layers of `model` draw by these keys, as `noise_keys` gave them."""
    layers, before = noise_layers(model), noise_keys(model)
    try:
        for layer, key in zip(layers, keys, strict=True):
            layer.key = key
        yield
    finally:
        for layer, key in zip(layers, before, strict=True):
            layer.key = key


class RandomisedSystem(TorchSystem):
    """A classifier with `GaussianNoise` layers whose answer is the mean softmax of `ensemble` draws.

    `logits` are the log of the mean softmax. `decide` takes the majority of `votes` such answers, each with fresh
    noise; a tie goes to the class of the higher mean probability. The view "adaptive" is EOT (Athalye et al. 2018):
    the log of the mean softmax over `draws` draws, whose gradient is that of the mean; "static" has one draw. Both
    draw afresh at every look, from a stream that no decision uses, so an attack never sees the noise it is judged by;
    neither is exact.
    """

    def __init__(
        self, classifier: nn.Module, *, input_shape: tuple[int, int, int], num_classes: int, ensemble: int = 10,
        draws: int = 20, votes: int = 5, seed: int = 0, name: str = "randomised",
    ) -> None:  # fmt: skip
        """Raises UserError unless all three counts are at least 1, and the classifier has noise to average."""
        super().__init__(classifier, input_shape=input_shape, num_classes=num_classes, name=name)
        if min(ensemble, draws, votes) < 1:
            raise UserError(f"{name}: ensemble, draws and votes must be at least 1, not {ensemble}, {draws}, {votes}")
        if not noise_layers(classifier):
            raise UserError(f"{name} has no noise layer, so there is nothing to average: use TorchSystem")
        self.ensemble, self.draws, self.votes, self.seed = ensemble, draws, votes, seed
        self.stochastic = self.changes_inference = True

    def logits(self, x: Tensor) -> Tensor:
        """The first of the answers that `decide` counts."""
        return self._mean(x, self.ensemble, "answer", 0)

    def decide(self, x: Tensor) -> Tensor:
        return self._majority(x, "answer")

    def views(self) -> dict[str, View]:
        def face(name: str, draws: int) -> View:
            looks = 0

            def logits(x: Tensor) -> Tensor:
                nonlocal looks
                looks += 1
                return self._mean(x, draws, "search", name, looks)

            def decisions(x: Tensor) -> Tensor:
                nonlocal looks
                looks += 1
                return self._majority(x, "asked", name, looks)

            return View(name, logits, False, self.offers, (draws, draws), decisions, system=self)

        return {"static": face("static", 1), "adaptive": face("adaptive", self.draws)}

    def decision_passes(self) -> tuple[int, int]:
        return self.ensemble * self.votes, 0

    def hash(self) -> str:
        numbers = [
            self.ensemble,
            self.draws,
            self.votes,
            self.seed,
            *(n.sigma for n in noise_layers(self.classifier)),
        ]
        return hashlib.sha256(f"{super().hash()} {numbers}".encode()).hexdigest()[:16]

    def _mean(self, x: Tensor, draws: int, *use: object) -> Tensor:
        """The log of the mean softmax over draws (N x C)."""
        parts = []
        for number in range(draws):
            with drawn(self.classifier, self.seed, *use, number):
                parts.append(self.classifier(x).log_softmax(1))
        return torch.stack(parts).logsumexp(0) - math.log(draws)

    def _majority(self, x: Tensor, *use: object) -> Tensor:
        with torch.no_grad():
            answers = torch.stack([self._mean(x, self.ensemble, *use, vote) for vote in range(self.votes)])
        counts = nn.functional.one_hot(answers.argmax(2), answers.shape[2]).sum(0)
        return (counts + 0.5 * answers.exp().mean(0)).argmax(1)
