"""Where a training run is, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from casemate.trainable import Context
from casemate.training.averages import LogMeans, WeightAverage
from casemate.training.snapshot import copy_into, named_tensors, pack_optimizers, under, unpack_optimizers
from casemate.training.updates import Updates, require_finite


@runtime_checkable
class Watchful(Protocol):
    """A method that looks at what it trains, as `casemate.defenses.alarm` does."""

    def look(self, ctx: Context, factor: float, *, epoch_over: bool) -> Literal["hold", "go back"] | None:
        """Called after each batch, and with `epoch_over` after an epoch's last one instead; most calls do nothing.

        It may set `ctx.keep` and `ctx.stop`, as in `epoch_end`. "hold": hold on to all that learns, in place of what
        was held before; "go back": put back what was held last, and go on. `factor`: of the learning rate.
        """
        ...


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
        self.held: dict[str, Tensor] = {}

    @property
    def result(self) -> dict[str, nn.Module]:
        """The modules whose weights are the result so far."""
        return self.modules if self.average is None else self.average.modules

    def settle(self) -> None:
        """Before `result` is measured or kept: what else belongs to averaged weights. A run says how."""

    def keep(self, row: Mapping[str, float], *, best: bool) -> None:
        """After an epoch with that row of the curves, hold on to its weights: with `best` if its robust accuracy is
        the highest so far, else if the method wants them kept."""
        score = row.get("val_robust", -1.0)
        wanted = score > self.best_score if best else self.context.keep
        if wanted:
            self.settle()
            self.best_score, self.best_epoch = score, row["epoch"]
            self.best = {key: tensor.detach().clone() for key, tensor in named_tensors(self.result).items()}
        self.context.keep = False

    def hold(self) -> None:
        """Hold on to all that learns: modules, moving average, optimizers."""
        self.held = {key: tensor.detach().clone() for key, tensor in self._learning().items()}

    @torch.no_grad()
    def go_back(self) -> None:
        """Put back what was held, in place: a captured step reads where it ever did. What an optimizer has begun
        since is zero again."""
        for key, tensor in self._learning().items():
            if key in self.held:
                tensor.copy_(self.held[key])
            else:
                tensor.zero_()
        if self.average is not None:
            self.average.unsettle()

    def _learning(self) -> dict[str, Tensor]:
        groups = {
            "module": named_tensors(self.modules),
            "average": {} if self.average is None else named_tensors(self.average.modules),
            "optimizer": pack_optimizers(self.updates.players)[0],
        }
        return {f"{group}/{key}": t for group, tensors in groups.items() for key, t in tensors.items()}

    def require_finite(self) -> None:
        """Raises NotFinite if a weight is not."""
        require_finite(self.modules, self.updates.players, self.step)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as named tensors and a JSON-able rest."""
        groups = {"state": self.context.state, "best": self.best, "held": self.held, "log": self.logs.sums}
        others = {f"{group}/{key}": t for group, tensors in groups.items() for key, t in tensors.items()}
        body = {
            "at": [self.epoch, self.batch, self.step],
            "stop": self.context.stop,
            "curves": self.curves,
            "best": [self.best_score, self.best_epoch],
            "losses": [self.updates.sums, self.updates.counts],
            "logs": self.logs.counts,
            "optimizers": pack_optimizers(self.updates.players)[1],
            "leaves": [key for key, tensor in self.context.state.items() if tensor.requires_grad],
        }
        return {**self._learning(), **others}, body

    def restore(self, tensors: Mapping[str, Tensor], body: Mapping[str, Any], what: str) -> None:
        """Go on from what `packed` gave. Raises UserError about `what` if its weights do not fit."""
        copy_into(self.modules, under("module", tensors), what)
        if self.average is not None:
            copy_into(self.average.modules, under("average", tensors), what)
        unpack_optimizers(self.updates.players, under("optimizer", tensors), body["optimizers"])
        self.context.state.update({k: t.to(self.device) for k, t in under("state", tensors).items()})
        for key in body["leaves"]:
            self.context.state[key].requires_grad_()
        self.best, self.held = (
            {k: t.to(self.device) for k, t in under(name, tensors).items()} for name in ("best", "held")
        )
        self.logs.sums = {k: t.to(self.device) for k, t in under("log", tensors).items()}
        self.logs.counts = body["logs"]
        self.updates.sums, self.updates.counts = body["losses"]
        (self.epoch, self.batch, self.step), self.curves = body["at"], body["curves"]
        self.best_score, self.best_epoch = body["best"]
        self.context.stop = body["stop"]
