"""Averages kept on the device: of the weights over steps, and of what methods log over an epoch.

The running statistics of batch norms are no weights: those of averaged weights are not the average of those of the
weights, and early in a run far from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.training.snapshot import named_tensors

Statistics = Literal["reestimated", "averaged", "live"]


class WeightAverage:
    """Exponential moving average of all parameters and buffers: avg <- avg + (1 - d) (weights - avg).

    After update t (from 1) d = 0 up to the end of the warm-up, and s updates after it min(decay, (1 + s) / (10 + s)),
    as TensorFlow's ExponentialMovingAverage with num_updates, so that a short run is not an average of its
    initialisation. Integer buffers are copied, and unless `statistics` is "averaged" the running statistics of batch
    norms; with "reestimated" they are the averaged modules' own after `settle`, until the next update.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decay: float, *, warmup: int = 0, statistics: Statistics = "averaged"
    ) -> None:
        self.decay, self.warmup = decay, warmup
        self.modules: dict[str, nn.Module] = copy.deepcopy(dict(modules))
        self._needed = [[p.requires_grad for p in module.parameters()] for module in modules.values()]
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        self._norms = norms(self.modules.values()) if statistics == "reestimated" else []
        fitted = [] if statistics == "averaged" else norms(self.modules.values())
        statistic = {id(t) for norm in fitted for t in (norm.running_mean, norm.running_var)}
        pairs = list(zip(named_tensors(self.modules).values(), named_tensors(modules).values(), strict=True))
        self._smooth = [(a, w) for a, w in pairs if a.is_floating_point() and id(a) not in statistic]
        self._copied = [(a, w) for a, w in pairs if not a.is_floating_point() or id(a) in statistic]
        self._settled = False

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights after step `t`, counted from 1."""
        since = t - self.warmup
        decay = min(self.decay, (1 + since) / (10 + since)) if since > 0 else 0.0
        torch._foreach_lerp_([a for a, _ in self._smooth], [w for _, w in self._smooth], 1 - decay)
        self._copy()

    def settle(self, rehearse: Callable[[dict[str, nn.Module]], None]) -> None:
        """Where statistics are re-estimated, make them the means over what `rehearse` shows to its modules.

        It gets a copy of the averaged modules, in which each batch norm in train mode counts every forward pass
        alike; one that sees none keeps the statistics of the weights. They begin from there each time, and depend on
        nothing that an earlier call has found. A second call before the next update does nothing.
        """
        if self._settled or not self._norms:
            return
        self._copy()
        made = copy.deepcopy(self.modules)
        for module, needed in zip(made.values(), self._needed, strict=True):
            for parameter, wanted in zip(module.parameters(), needed, strict=True):
                parameter.requires_grad_(wanted)
        fresh = norms(made.values())
        for norm in fresh:
            assert norm.num_batches_tracked is not None
            norm.momentum = None  # the first pass overwrites what is there, and crafting before it has found it
            norm.num_batches_tracked.zero_()
        rehearse(made)
        with torch.no_grad():
            for own, norm in zip(self._norms, fresh, strict=True):
                for kept, found in ((own.running_mean, norm.running_mean), (own.running_var, norm.running_var)):
                    assert kept is not None and found is not None
                    kept.copy_(found)
        self._settled = True

    def unsettle(self) -> None:
        """The weights have been put back to other ones."""
        self._settled = False

    @torch.no_grad()
    def _copy(self) -> None:
        if self._copied:
            torch._foreach_copy_([a for a, _ in self._copied], [w for _, w in self._copied])
        self._settled = False


def norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The batch norms that keep running statistics, each once."""
    found = {id(part): part for module in modules for part in module.modules() if isinstance(part, _BatchNorm)}
    return [norm for norm in found.values() if norm.track_running_stats and norm.running_mean is not None]


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
