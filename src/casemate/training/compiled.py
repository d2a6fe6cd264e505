"""torch.compile as an option of the recipe: the same run, and the plain modules where compiling fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OPTIONS: dict[str, Any] = {"options": {"fallback_random": True}}  # dropout draws what it draws without compiling


@contextmanager
def compiled(modules: Mapping[str, nn.Module], note: Callable[[str], None]) -> Iterator[None]:
    """While open, calls of the modules are compiled; one whose compilation fails goes on without, and `note` says so.

    Calls of their methods (`features`, `taps`) are as they were.
    """
    from torch._functorch import config

    for name, module in modules.items():
        module._compiled_call_impl = _Compiled(name, module, note)
    try:
        with config.patch(donated_buffer=False):  # a step may go through one graph twice
            yield
    finally:
        for module in modules.values():
            module._compiled_call_impl = None


class _Compiled:
    def __init__(self, name: str, module: nn.Module, note: Callable[[str], None]) -> None:
        self.name, self.module, self.note = name, module, note
        self.fast = torch.compile(module._call_impl, **OPTIONS)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        try:
            with torch._C.DisableTorchFunction():  # what watches the step outside would be compiled in
                return self.fast(*inputs, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.note(f"warning: {self.name} could not be compiled and runs as it is ({first_lines(error)})")
            self.module._compiled_call_impl = None
            return self.module(*inputs, **options)


def in_backward(error: RuntimeError) -> bool:
    """Whether compiling is to blame for an error that the modules themselves would not have made."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) or "aot_autograd" in str(error)


def first_lines(error: Exception) -> str:
    """What an error says, in short: the compiler's name its stage first and the reason second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__
