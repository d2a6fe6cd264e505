"""Adversarial weight perturbation (Wu, Xia & Wang 2020): each step is taken at the worst weights nearby.

It belongs to the recipe, and composes with any method: what it ascends and what is then descended is the same
`Update.loss`, on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.errors import UserError
from casemate.training.recipe import Recipe

TINY = 1e-20
STALE = ("backward through the graph a second time", "modified by an inplace operation")
"""What autograd says of a graph that was made at other weights."""


class WeightPerturbation:
    """Moves weights w_l to w_l + v_l while a gradient is taken, v_l = gamma |w_l| u_l / |u_l|, u = grad loss(w).

    Every tensor of two dimensions or more is a layer of its own; biases and the scales of normalisations stay. The
    running statistics of batch norms move once: at the moved weights, as published, or with `statistics` "own" at w.
    Costs one more forward pass and one more weight gradient of whatever the loss does.
    """

    def __init__(self, modules: Mapping[str, nn.Module], recipe: Recipe) -> None:
        self.gamma, self.warmup, self.statistics = recipe.awp, recipe.awp_warmup, recipe.awp_statistics
        parts = [part for module in modules.values() for part in module.modules()]
        self._norms = [part for part in parts if isinstance(part, _BatchNorm) and part.track_running_stats]
        self._modules = list(modules.values())

    def beside(self, parameters: Sequence[nn.Parameter]) -> frozenset[int]:
        """The ids of all parameters of the modules that hold one of `parameters`: what is perturbed with them."""
        wanted = {id(p) for p in parameters}
        owned = [frozenset(map(id, module.parameters())) for module in self._modules]
        return frozenset(wanted).union(*(ids for ids in owned if ids & wanted))

    @contextmanager
    def around(
        self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], fraction: float
    ) -> Iterator[None]:
        """While open, `parameters` are where `loss` is worst; nothing happens before the warm-up is over.

        A step that is taken inside is kept: what is subtracted on leaving is v. `loss` is evaluated once here, so it
        must build its graph itself and not find one made before: else UserError.
        """
        layers: list[Tensor] = [p for p in parameters if p.dim() > 1]
        if fraction < self.warmup or not layers:
            yield
            return
        with _explained(), self._fixed_statistics(self.statistics == "moved"):
            slopes = torch.autograd.grad(loss(), layers, allow_unused=True)
        moves = self._moves(layers, slopes)
        with torch.no_grad():
            torch._foreach_add_(layers, moves)
        try:
            with _explained(), self._fixed_statistics(self.statistics == "own"):
                yield
        finally:
            with torch.no_grad():
                torch._foreach_sub_(layers, moves)

    @torch.no_grad()
    def _moves(self, layers: list[Tensor], slopes: Sequence[Tensor | None]) -> list[Tensor]:
        """v for each layer; zero where the loss does not reach it."""
        known = [torch.zeros_like(w) if u is None else u for w, u in zip(layers, slopes, strict=True)]
        sizes, lengths = torch._foreach_norm(list(layers)), torch._foreach_norm(known)
        return [
            u * (self.gamma * size / (length + TINY)) for u, size, length in zip(known, sizes, lengths, strict=True)
        ]

    @contextmanager
    def _fixed_statistics(self, fixed: bool) -> Iterator[None]:
        """Batch norms in train mode use the statistics of the batch, as ever; with `fixed` they remember nothing."""
        tracking = [norm.track_running_stats for norm in self._norms]
        try:
            for norm in self._norms if fixed else ():
                norm.track_running_stats = False
            yield
        finally:
            for norm, before in zip(self._norms, tracking, strict=True):
                norm.track_running_stats = before


@contextmanager
def _explained() -> Iterator[None]:
    """A graph that outlived its weights is the method's way to save a forward pass, and the user's choice to mend."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in STALE):
            raise
        raise UserError(
            "awp evaluates each loss twice, and this method with these options keeps a graph from one update to the "
            "next: set awp: 0, or an option that does not"
        ) from error
