"""Batch norms folded into the convolutions before them, for as long as a step crafts in eval mode.

In eval mode a batch norm is a scale and a shift per channel, which the convolution can take over: the same function
up to rounding, and one pass over the activations less each way. It pays on a GPU, where those passes cost as much as
the convolutions; on a CPU it gains nothing. The weights, frozen for as long, are cast once and not in every pass.
Off unless the recipe says `fold_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Pair = tuple[nn.Conv2d, nn.BatchNorm2d | None]

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
            if norm is not None:
                vars(norm)["forward"] = _same
        yield
    finally:
        for part in (part for pair in chosen for part in pair if part is not None):
            vars(part).pop("forward", None)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Convolutions and norms of our own are whole, as those of torch are."""
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def foldable(module: nn.Module) -> list[Pair]:
    """The convolutions that are used once, with the batch norm that alone reads their output, if there is one; empty
    if the module's forward pass cannot be traced. A part that is used twice is left as it is."""
    try:
        nodes = list(_Tracer().trace(module).nodes)
    except Exception:  # tracing runs the module's own code on stand-ins, and may fail in any way
        return []
    parts = dict(module.named_modules())
    calls = [node.target for node in nodes if node.op == "call_module"]
    found: list[Pair] = []
    for node in nodes:
        conv = parts[str(node.target)] if node.op == "call_module" and calls.count(node.target) == 1 else None
        if not isinstance(conv, nn.Conv2d):
            continue
        readers = list(node.users)
        after = readers[0].target if len(readers) == 1 and readers[0].op == "call_module" else None
        norm = parts[str(after)] if after is not None and calls.count(after) == 1 else None
        whole = isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
        found.append((conv, norm if whole else None))
    return found


def _pairs(module: nn.Module, say: Callable[[str], None]) -> list[Pair]:
    if module not in _PAIRS:
        _PAIRS[module] = foldable(module)
        norms = any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
        if norms and all(norm is None for _, norm in _PAIRS[module]):
            say(f"fold_norms: no batch norm of {type(module).__name__} follows a convolution that can take it over")
    return _PAIRS[module]


class _Folded:
    """The forward pass of a convolution with the norm after it, the weights made once for each dtype."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        self.conv, self.weight, self.bias = conv, conv.weight.detach(), conv.bias
        self.made: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        if norm is not None:
            with torch.no_grad():
                scale, shift = _scale_and_shift(norm)
                self.weight = conv.weight * scale.view(-1, 1, 1, 1)
                self.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias * scale, False)

    def __call__(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if dtype not in self.made:  # autocast would cast frozen weights anew in every pass
            self.made[dtype] = (self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        out: Tensor = self.conv._conv_forward(x, *self.made[dtype])
        return out


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The norm in eval mode as x * scale + shift, per channel."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _same(x: Tensor) -> Tensor:
    return x
