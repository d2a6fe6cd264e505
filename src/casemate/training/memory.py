"""What happens when a device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.randomised import keyed, noise_keys

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free() -> None:
    """Give memory that is only cached back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(work: Callable[[int], None], size: int) -> int:
    """The first of `size`, its half, its quarter and so on for which `work` has memory; 0 if one is too much, too, or
    if it fails in another way."""
    while size:
        free()
        try:
            work(size)
            return size
        except (RuntimeError, MemoryError) as error:
            size = size // 2 if out_of_memory(error) else 0
    return size


def in_pieces(work: Callable[[], T], module: nn.Module | None, images: int, say: Callable[[str], None]) -> T:
    """`work()`, and where memory does not suffice again with `module` seeing its batches of `images` in halves,
    quarters and so on. The work must be one that can be repeated. Batches are cut inside the module, so nothing else
    of the work changes: draws, steps and results are those of the whole batch up to rounding.

    Raises UserError if one image is too much, or if there is no module to cut for.
    """
    piece = images
    while True:
        try:
            if piece == images or module is None:
                return work()
            with cut(module, piece):
                return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if piece == 1 or module is None:
                what, mend = "one image", "a smaller network"
                if module is None:
                    what, mend = (
                        f"{images} images at once, which cannot be cut here",
                        "fewer images at once (evaluate.chunk, --chunk)",
                    )
                raise UserError(f"out of memory with {what}: use a device with more, or {mend}") from None
            piece = max(1, piece // 2)
        free()
        say(f"out of memory: {images} images go through the network {piece} at a time; results are the same")


@contextmanager
def cut(module: nn.Module, piece: int) -> Iterator[None]:
    """While open, calls of the module with a batch in eval mode are made for `piece` images at a time. Gradients are
    of the input alone, and cost one more forward pass; calls of the module's methods are as they were."""
    plain = module._compiled_call_impl
    module._compiled_call_impl = _Cut(module, piece)
    try:
        yield
    finally:
        module._compiled_call_impl = plain


class _Cut:
    def __init__(self, module: nn.Module, piece: int) -> None:
        self.module, self.piece = module, piece

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        fits = len(inputs) != 1 or options or self.module.training or len(inputs[0]) <= self.piece
        return _plain(self.module, *inputs, **options) if fits else _Pieces.apply(*inputs, self.module, self.piece)


def _plain(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The module called as if nothing cut it."""
    call: Callable[..., Any] = module._call_impl
    return call(*inputs, **options)


class _Pieces(torch.autograd.Function):
    """Keeps the input alone, and repeats the forward pass of each piece when its gradient is wanted, by when the draw
    of noise that it was made with may be over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, piece: int) -> Tensor:
        kind = x.device.type
        ctx.module, ctx.piece = module, piece
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.noise = noise_keys(module)
        ctx.save_for_backward(x)
        return torch.cat([_plain(module, part) for part in torch.split(x, piece)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *above: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        kind, dtype, enabled = ctx.autocast
        slopes: list[Tensor] = []
        parts = zip(torch.split(x, ctx.piece), torch.split(above[0], ctx.piece), strict=True)
        for part, slope in parts:
            with (
                torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled),
                keyed(ctx.module, ctx.noise),
            ):  # fmt: skip
                at = part.detach().requires_grad_()
                out = _plain(ctx.module, at)
            slopes += torch.autograd.grad(out, at, slope)
        return torch.cat(slopes), None, None
