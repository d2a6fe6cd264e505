"""Where a training run is, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from casemate.trainable import Context
from casemate.training.averages import LogMeans, WeightAverage
from casemate.training.snapshot import copy_into, named_tensors, pack_optimizers, under, unpack_optimizers
from casemate.training.updates import Updates, require_finite


class RunState:
    """All that changes from step to step. Between two batches, what `packed` gives is the whole of it."""

    def __init__(
        self, modules: dict[str, nn.Module], updates: Updates, average: WeightAverage | None, context: Context,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.modules, self.updates, self.average, self.context = modules, updates, average, context
        self.device, self.logs = device, LogMeans(device)
        self.epoch = self.batch = self.step = 0
        self.curves: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_epoch = -1.0, 0.0

    @property
    def result(self) -> dict[str, nn.Module]:
        """The modules whose weights are the result so far."""
        return self.modules if self.average is None else self.average.modules

    def keep(self, row: Mapping[str, float], *, best: bool) -> None:
        """After an epoch with that row of the curves, hold on to its weights: with `best` if its robust accuracy is
        the highest so far, else if the method wants them kept."""
        score = row.get("val_robust", -1.0)
        wanted = score > self.best_score if best else self.context.keep
        if wanted:
            self.best_score, self.best_epoch = score, row["epoch"]
            self.best = {key: tensor.detach().clone() for key, tensor in named_tensors(self.result).items()}
        self.context.keep = False

    def require_finite(self) -> None:
        """Raises NotFinite if a weight is not."""
        require_finite(self.modules, self.updates.players, self.step)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as named tensors and a JSON-able rest."""
        optimizers, plain = pack_optimizers(self.updates.players)
        groups = {
            "module": named_tensors(self.modules),
            "average": {} if self.average is None else named_tensors(self.average.modules),
            "optimizer": optimizers,
            "state": self.context.state,
            "best": self.best,
            "log": self.logs.sums,
        }
        body = {
            "at": [self.epoch, self.batch, self.step],
            "stop": self.context.stop,
            "curves": self.curves,
            "best": [self.best_score, self.best_epoch],
            "losses": [self.updates.sums, self.updates.counts],
            "logs": self.logs.counts,
            "optimizers": plain,
            "leaves": [key for key, tensor in self.context.state.items() if tensor.requires_grad],
        }
        return {f"{group}/{key}": t for group, tensors in groups.items() for key, t in tensors.items()}, body

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any], what: str) -> None:
        """Go on from what `packed` gave. Raises UserError about `what` if its weights do not fit."""
        copy_into(self.modules, under("module", tensors), what)
        if self.average is not None:
            copy_into(self.average.modules, under("average", tensors), what)
        unpack_optimizers(self.updates.players, under("optimizer", tensors), body["optimizers"])
        self.context.state.update({k: t.to(self.device) for k, t in under("state", tensors).items()})
        for key in body["leaves"]:
            self.context.state[key].requires_grad_()
        self.best = {k: t.to(self.device) for k, t in under("best", tensors).items()}
        self.logs.sums = {k: t.to(self.device) for k, t in under("log", tensors).items()}
        self.logs.counts = body["logs"]
        self.updates.sums, self.updates.counts = body["losses"]
        (self.epoch, self.batch, self.step), self.curves = body["at"], body["curves"]
        self.best_score, self.best_epoch = body["best"]
        self.context.stop = body["stop"]
