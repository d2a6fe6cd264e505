"""A quick layer held against torch's own, for the tests of `casemate.networks.quick`'s layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def same_gradients(plain: nn.Module, fast: nn.Module, x: Tensor, wanted: Tensor, found: Tensor) -> None:
    """Assert that the outputs `wanted` and `found` of the two at `x` have the same gradients, for the input and for
    every weight that learns."""
    slope = torch.randn_like(wanted)
    learned = [[p for p in layer.parameters() if p.requires_grad] for layer in (plain, fast)]
    sides = [
        torch.autograd.grad(out, (x, *weights), slope) for out, weights in zip((wanted, found), learned, strict=True)
    ]
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
