"""A randomised system as one graph: the mean softmax of an ensemble of noise draws, all in one batch."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from casemate.randomised import GaussianNoise, drawn, noise_layers

Noise = Literal["seeded", "random"]


class FixedNoise(nn.Module):
    """x + the noise of each draw, for a batch that holds every image once for each draw, draw by draw."""

    noise: Tensor

    def __init__(self, noise: Tensor) -> None:
        """noise: draws x 1 x C x H x W, or draws x 1 x D."""
        super().__init__()
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        by_draw = x.reshape(len(self.noise), -1, *x.shape[1:])
        return (by_draw + self.noise).reshape(-1, *x.shape[1:])


class FreshNoise(nn.Module):
    """x + sigma N(0, 1), drawn anew for every image and draw whenever the file runs."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x)


class Ensemble(nn.Module):
    """image N x C x H x W -> log of the mean softmax over `draws` draws (N x classes), as `RandomisedSystem.logits`.

    "seeded" noise is that of `RandomisedSystem(seed=seed)`: constants of the graph, the same for every image, so that
    equal images get equal answers, and whoever has the file knows the noise. "random" noise is drawn by the runtime.
    """

    def __init__(self, classifier: nn.Module, sample: Tensor, draws: int, noise: Noise, seed: int) -> None:
        super().__init__()
        self.draws = draws
        self.classifier = copy.deepcopy(classifier)
        if noise == "random":
            made: list[nn.Module] = [FreshNoise(layer.sigma) for layer in noise_layers(self.classifier)]
        else:
            made = [FixedNoise(part) for part in _noise(self.classifier, sample, draws, seed)]
        _exchange(self.classifier, made)

    def forward(self, x: Tensor) -> Tensor:
        answers = self.classifier(x.repeat(self.draws, 1, 1, 1)).log_softmax(1)
        by_draw = answers.reshape(self.draws, -1, answers.shape[1])
        out: Tensor = by_draw.logsumexp(0) - math.log(self.draws)
        return out


def _noise(classifier: nn.Module, sample: Tensor, draws: int, seed: int) -> list[Tensor]:
    """For each noise layer draws x 1 x ...: what `RandomisedSystem.logits` adds there."""
    shapes: dict[nn.Module, torch.Size] = {}
    layers = noise_layers(classifier)
    hooks = [layer.register_forward_hook(lambda m, given, out: shapes.update({m: out.shape[1:]})) for layer in layers]
    with torch.no_grad():
        classifier(sample[:1])
    for hook in hooks:
        hook.remove()
    parts: list[list[Tensor]] = [[] for _ in layers]
    for number in range(draws):
        with drawn(classifier, seed, "answer", 0, number):
            for part, layer in zip(parts, layers, strict=True):
                part.append(layer(torch.zeros(1, *shapes[layer])))
    return [torch.stack(part) for part in parts]


def _exchange(classifier: nn.Module, made: list[nn.Module]) -> None:
    """Put `made` in the place of the noise layers, in their order."""
    found = {id(layer): new for layer, new in zip(noise_layers(classifier), made, strict=True)}
    for parent in list(classifier.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GaussianNoise):
                setattr(parent, name, found[id(child)])
