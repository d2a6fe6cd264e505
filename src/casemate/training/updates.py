"""One optimisation step of the named players, and the check that all is still finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from casemate.trainable import Player, Update
from casemate.training.awp import WeightPerturbation
from casemate.training.precision import Chosen, autocast, choose


class NotFinite(Exception):
    """A loss or a weight is nan or inf; `step` is the first one where that was seen."""

    def __init__(self, players: Iterable[str], what: str, value: float, step: int) -> None:
        self.step = step
        super().__init__(f"{what} of player {' + '.join(players) or 'nobody'} is {value}")


class Updates:
    """Applies `Update`s. Losses stay on the device until `check`, which reads all since the last in one transfer."""

    def __init__(
        self, players: Mapping[str, Player], default: Chosen, device: torch.device,
        perturbation: WeightPerturbation | None = None,
    ) -> None:  # fmt: skip
        self.players, self.device, self.perturbation = dict(players), device, perturbation
        self.primary = next(iter(self.players))
        own = self.players[self.primary].parameters
        self._perturbable = frozenset[int]() if perturbation is None else perturbation.beside(own)
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.fraction = 0.0
        self._initial = {n: [g["lr"] for g in p.optimizer.param_groups] for n, p in self.players.items()}
        self._precision = {
            n: default if p.precision == "auto" else choose(p.precision, device, ()) for n, p in self.players.items()
        }
        self.pending: list[tuple[int, tuple[str, ...], Tensor]] = []

    def begin(self, fraction: float) -> None:
        """Start a step: learning rates of that fraction of the budget, and no gradient anywhere."""
        self.fraction = fraction
        for name, player in self.players.items():
            if player.schedule is not None:
                factor = player.schedule(fraction)
                for group, initial in zip(player.optimizer.param_groups, self._initial[name], strict=True):
                    if isinstance(group["lr"], Tensor):
                        group["lr"].fill_(initial * factor)
                    else:
                        group["lr"] = initial * factor
        self.clear()

    @property
    def perturbing(self) -> bool:
        """Whether the next update of the primary player's module is taken at perturbed weights."""
        return self.perturbation is not None and self.fraction >= self.perturbation.warmup

    def capturable(self) -> None:
        """Put the learning rates that change where a CUDA graph reads them, and step counts on the device."""
        for player in self.players.values():
            for group in player.optimizer.param_groups:
                if player.schedule is not None and not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
                if "capturable" in group and self.device.type == "cuda":
                    group["capturable"] = True
                    player.optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not captured

    def clear(self) -> None:
        """Drop every player's gradient."""
        for player in self.players.values():
            for parameter in player.parameters:
                parameter.grad = None

    def apply(self, update: Update, step: int) -> None:
        """Loss, gradients of the named players' parameters and the extra leaves only, clipping, optimizer steps."""
        unknown = set(update.players) - set(self.players)
        if unknown or not update.players:
            raise ValueError(f"update of {sorted(unknown) or 'nobody'}; players: {', '.join(self.players)}")
        players = [self.players[name] for name in update.players]
        leaves = [*(p for player in players for p in player.parameters), *update.extra_leaves]
        if update.zero_grad:
            for leaf in leaves:
                leaf.grad = None
        with self._perturbed(update):
            loss = self._loss(update)
            torch.autograd.backward(loss, inputs=leaves)
            for player in players:
                if player.max_grad_norm is not None:
                    clip_grad_norm_(player.parameters, player.max_grad_norm)
                player.optimizer.step()
        for player in players:
            if player.after_step is not None:
                player.after_step()
        self.pending.append((step, update.players, loss.detach()))

    def rehearse(self, update: Update) -> None:
        """The forward passes of an update, and the gradients of its extra leaves, since a step may read them. Nobody
        learns."""
        loss = self._loss(update)
        for leaf in update.extra_leaves:
            leaf.grad = None
        if update.extra_leaves:
            torch.autograd.backward(loss, inputs=list(update.extra_leaves))

    def _loss(self, update: Update) -> Tensor:
        """The update's loss in the precision of its players."""
        half = all(self._precision[name] == "bf16" for name in update.players)
        with autocast("bf16" if half else "fp32", self.device):
            loss = update.loss()
        if loss.dim() != 0:
            raise ValueError(f"the loss of {' + '.join(update.players)} must be a scalar, not {tuple(loss.shape)}")
        return loss

    def _perturbed(self, update: Update) -> AbstractContextManager[None]:
        """The moved weights of the primary player's module, its other players' included, where the recipe wants their
        gradients: an encoder and its head are one classifier."""
        if self.perturbation is None:
            return nullcontext()
        moved = [p for name in update.players for p in self.players[name].parameters if id(p) in self._perturbable]
        return self.perturbation.around(lambda: self._loss(update), moved, self.fraction)

    def check(self) -> float | None:
        """Wait for the device; the primary player's mean loss since the last check. Raises NotFinite."""
        if not self.pending:
            return None
        pending = list(self.pending)
        self.pending.clear()
        values = torch.stack([loss.float() for _, _, loss in pending])
        recent: list[float] = []
        for (step, players, _), value in zip(pending, values.tolist(), strict=True):
            if value - value != 0:  # nan and both infinities
                raise NotFinite(players, "the loss", value, step)
            key = "loss" if self.primary in players else "loss_" + "_".join(players)
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
            if key == "loss":
                recent.append(value)
        return sum(recent) / len(recent) if recent else None

    def means(self) -> dict[str, float]:
        """Mean losses since the last `reset`, up to the last `check`."""
        return {key: total / self.counts[key] for key, total in self.sums.items()}

    def reset(self) -> None:
        """Begin new means."""
        self.sums, self.counts = {}, {}

    def factor(self) -> float:
        """By what the primary player's initial learning rate is multiplied in this step; known on the host."""
        schedule = self.players[self.primary].schedule
        return 1.0 if schedule is None else schedule(self.fraction)

    def lr(self) -> float:
        """The primary player's learning rate."""
        return float(self.players[self.primary].optimizer.param_groups[0]["lr"])


@torch.no_grad()
def require_finite(modules: Mapping[str, nn.Module], players: Mapping[str, Player], step: int) -> None:
    """Raise NotFinite if a parameter is not: a gradient can overflow where the loss did not."""
    named = ((f"{name}.{key}", p) for name, module in modules.items() for key, p in module.named_parameters())
    tensors = {key: p for key, p in named if p.numel()}
    if not tensors:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()), float("inf"))])
    if not bool(norms.isfinite().all()):
        at = int((~norms.isfinite()).nonzero()[0, 0])
        key, tensor = list(tensors.items())[at]
        owners = [name for name, player in players.items() if any(tensor is p for p in player.parameters)]
        raise NotFinite(owners, key, float(norms[at]), step)
