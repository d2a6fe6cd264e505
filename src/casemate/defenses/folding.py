"""Batch norms folded into the convolutions before them, for as long as a step crafts in eval mode.

In eval mode a batch norm is a scale and a shift per channel, which the convolution can take over: the same function
up to rounding, and one pass over the activations less each way. It pays on a GPU, where those passes cost as much as
the convolutions; on a CPU it gains nothing. Off unless the recipe says `fold_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]

_SAY: ContextVar[Callable[[str], None] | None] = ContextVar("folding", default=None)
_PAIRS: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()


@contextmanager
def folding(say: Callable[[str], None]) -> Iterator[None]:
    """While open, `crafting` in eval mode folds. `say` is told of a module in which nothing can be."""
    token = _SAY.set(say)
    try:
        yield
    finally:
        _SAY.reset(token)


@contextmanager
def folded(*modules: nn.Module) -> Iterator[None]:
    """While open, and inside `folding`, the batch norms of the modules (in eval mode) that can be are folded."""
    say = _SAY.get()
    chosen = [] if say is None else [pair for module in modules for pair in _pairs(module, say)]
    try:
        for conv, norm in chosen:
            vars(conv)["forward"] = _Folded(conv, norm)
            vars(norm)["forward"] = _same
        yield
    finally:
        for pair in chosen:
            for part in pair:
                vars(part).pop("forward", None)


def foldable(module: nn.Module) -> list[Pair]:
    """The convolutions whose output one batch norm and nothing else reads, with that norm; empty if the module's
    forward pass cannot be traced. A part that is used twice is left as it is."""
    try:
        nodes = list(torch.fx.symbolic_trace(module).graph.nodes)
    except Exception:  # tracing runs the module's own code on stand-ins, and may fail in any way
        return []
    parts = dict(module.named_modules())
    calls = [node.target for node in nodes if node.op == "call_module"]
    found: list[Pair] = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = parts[str(before.target)], parts[str(node.target)]
        once = calls.count(node.target) == calls.count(before.target) == 1
        if once and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            found.append((conv, norm))
    return found


def _pairs(module: nn.Module, say: Callable[[str], None]) -> list[Pair]:
    if module not in _PAIRS:
        _PAIRS[module] = foldable(module)
        norms = sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
        if norms and not _PAIRS[module]:
            say(f"fold_norms: no batch norm of {type(module).__name__} follows a convolution that can take it over")
    return _PAIRS[module]


class _Folded:
    """The forward pass of a convolution with the norm after it, the weights made once for each dtype."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else shift + norm.bias
            self.weight = conv.weight * scale.view(-1, 1, 1, 1)
            self.bias = shift if conv.bias is None else shift + conv.bias * scale
        self.conv = conv
        self.made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if dtype not in self.made:  # autocast would cast frozen weights anew in every pass
            self.made[dtype] = (self.weight.to(dtype), self.bias.to(dtype))
        out: Tensor = self.conv._conv_forward(x, *self.made[dtype])
        return out


def _same(x: Tensor) -> Tensor:
    return x
