"""Batch norms in eval mode, with an input gradient that is one product on a CPU.

In eval mode a batch norm is x * scale + shift per channel, so its input gradient is the gradient times the scale. The
library's own backward pass gathers the sums for the weights' gradients as well, wanted or not: without them an attack
step on a pre-activation ResNet-18 takes 6 to 7 % less time. Outputs and gradients stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.networks.shallow import own_gradient


class FrozenNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, quick where it is in eval mode, its weights frozen and the gradient of its input wanted."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if isinstance(x, Tensor):  # torch.fx calls with a stand-in
            self._check_input_dim(x)
        constants = (self.running_mean, self.running_var, self.weight, self.bias)
        if own_gradient(x) and not any(t.requires_grad for t in constants if t is not None):
            made: Tensor = _Scaled.apply(x, *constants, self.eps)
            return made
        return F.batch_norm(x, *constants, False, 0.0, self.eps)


class _Scaled(torch.autograd.Function):
    """The norm as it is; its backward is made of differentiable operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, variance, weight, _, ctx.eps = inputs
        ctx.save_for_backward(variance, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        variance, weight = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        return gradients[0] * scale.view(-1, 1, 1), None, None, None, None, None
