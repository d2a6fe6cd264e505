"""Averages kept on the device: of the weights over steps, and of what methods log over an epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from casemate.training.snapshot import named_tensors


class WeightAverage:
    """Exponential moving average of all parameters and buffers: avg <- avg + (1 - d) (weights - avg).

    After update t (from 1) d = min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage with
    num_updates, so that a short run is not an average of its initialisation. Integer buffers are copied.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules: dict[str, nn.Module] = copy.deepcopy(dict(modules))
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        pairs = list(zip(named_tensors(self.modules).values(), named_tensors(modules).values(), strict=True))
        self._smooth = [(a, w) for a, w in pairs if a.is_floating_point()]
        self._copied = [(a, w) for a, w in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights after step `t`, counted from 1."""
        decay = min(self.decay, (1 + t) / (10 + t))
        torch._foreach_lerp_([a for a, _ in self._smooth], [w for _, w in self._smooth], 1 - decay)
        if self._copied:
            torch._foreach_copy_([a for a, _ in self._copied], [w for _, w in self._copied])


class LogMeans:
    """Means of the scalars that a method logs, each over the steps that logged it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's scalars and empty the dictionary."""
        for key, value in values.items():
            if key not in self.sums:
                self.sums[key] = torch.zeros((), device=self.device)
                self.counts[key] = 0
            self.sums[key] += value
            self.counts[key] += 1
        values.clear()

    def means(self) -> dict[str, float]:
        """Means since the last `reset`, those left out that are no number, such as the mean of an empty selection:
        nothing that is logged may cost a training."""
        means = {key: float(total) / self.counts[key] for key, total in self.sums.items()}
        return {key: mean for key, mean in means.items() if math.isfinite(mean)}

    def reset(self) -> None:
        """Begin new means."""
        self.sums, self.counts = {}, {}
