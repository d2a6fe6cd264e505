"""Captures work on the CPU and repeats it, as a CUDA graph does on a GPU: the same operations on the same memory,
with the numbers that Python had when it was captured. Nothing of the work takes effect while it is captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in SYNCS:
            raise RuntimeError(f"operation not permitted while capturing: {func._schema.name}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(value)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(kwargs[argument.name])
        if "batch_norm" in func._schema.name and "backward" not in func._schema.name:
            self._remember(args[3:5])  # running statistics, which its schema does not say it moves
        out = func(*args, **kwargs)
        results = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        old = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        self.made |= {value.untyped_storage().data_ptr() for value in results} - old
        self.alive.append((args, kwargs, results))
        self.calls.append((func, args, kwargs, results))
        return out

    def _remember(self, given: Any) -> None:
        for value in tree_flatten(given)[0]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault(id(value), (value, value.detach().clone()))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                out = func(*tree_map_only(Tensor, Tensor.detach, args), **kwargs)
                fresh = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
                for old, new in zip(results, fresh, strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.detach().copy_(new)


class CPU:
    """A backend of `casemate.training.graphs`."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return tape(work)

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


def tape(work: Callable[[], None]) -> Callable[[], None]:
    """What `work` did; it has no effect before that is called."""
    recording = Tape()
    with torch.random.fork_rng([]), recording:
        work()
    with torch.no_grad():
        for value, was in recording.before.values():
            value.detach().copy_(was)
    return recording.replay
