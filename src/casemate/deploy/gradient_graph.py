"""A module's input gradient as an ordinary module: a flat graph that can be exported.

`torch.onnx.export` refuses a forward pass that calls autograd. Here the gradient is traced once into its forward
and backward operators, which `casemate.deploy.decompositions` rewrites into ones that ONNX has. What comes out
calls no autograd: it is exported, saved and run like any network. See docs/gradient_graph.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from casemate.deploy.blocked import enter_blocked_layout
from casemate.deploy.decompositions import ConvMode, table
from casemate.deploy.pooling import PoolMode
from casemate.deploy.tracing import operator_named, trace
from casemate.errors import UserError
from casemate.system import frozen

INDEPENDENT = "the objective does not depend on the input through differentiable operators"

WOBBLES, ROUNDING = 4, 1e-6
ALIKE = 0.99  # cosine of the whole batch, however much rounding does to a chaotic network

Objective = Callable[[Any], Tensor]


def gradient_graph(
    module: nn.Module, objective: Objective, sample: Tensor, *, conv: ConvMode = "auto", pool: PoolMode = "auto"
) -> fx.GraphModule:
    """A module `forward(x) -> (gradient, value, outputs)` that computes d objective / d x without autograd.

    module: x (N, ...) -> outputs, a tensor or a tuple of tensors, on the CPU. Samples must be independent of each
      other (it runs in eval mode), so the gradient of the sum over the batch holds each sample's own gradient.
    objective: outputs -> value (N,), differentiable in x.
    sample: an input (N, ...) of the wanted shape. Everything but the batch size is fixed by it.
    conv, pool: how the gradients of convolution and max pooling are written; see `decompositions.table`.

    gradient has the shape of x, value is (N,), outputs are as `module` gives them. The weights are those of
    `module` (shared, not copied). The graph is compared with autograd on `sample` before it is returned.
    Raises UserError naming the operator that has no gradient, or whose gradient has no exportable form.
    """

    def summed(x: Tensor) -> tuple[Tensor, tuple[Tensor, Any]]:
        outputs = module(x)
        value = objective(outputs)
        if value.shape != x.shape[:1]:
            raise UserError(f"the objective must give one value per sample, not shape {tuple(value.shape)}")
        return value.sum(), (value, outputs)

    def step(x: Tensor) -> tuple[Tensor, Tensor, Any]:
        gradient, (value, outputs) = torch.func.grad(summed, has_aux=True)(x)
        return gradient, value, outputs

    with frozen(module):
        expected = _autograd(summed, sample)
        graph = trace(step, sample, table(conv, pool))
        _refuse_unknown(graph)
        if not bool(expected.any()) and not _reads_pixels(graph):
            raise UserError(INDEPENDENT)
        if conv != "transpose":
            enter_blocked_layout(graph)
        with torch.no_grad():
            got = graph(sample)[0]
        _compare(got, expected, lambda x: _autograd(summed, x), sample)
    return graph


def _refuse_unknown(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("aten.") and "_backward" in name:
            raise UserError(f"the gradient of this network needs operator {name}, which has no exportable form")


def _reads_pixels(graph: fx.GraphModule) -> bool:
    """Whether the gradient depends on the input's values; that of a linear network, for one, does not."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    stack, seen = [output.args[0][0]], set()
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return True
        if node not in seen and node.target is not torch.ops.aten.sym_size.int:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _autograd(summed: Callable[[Tensor], Any], sample: Tensor) -> Tensor:
    x = sample.detach().clone().requires_grad_()
    try:
        total, _ = summed(x)
        (gradient,) = torch.autograd.grad(total, x)
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if "does not require grad" in text or "not have been used" in text:
            raise UserError(INDEPENDENT) from error
        raise UserError(f"the network cannot be differentiated: {operator_named(text)}") from error
    return gradient.detach()


def _compare(got: Tensor, expected: Tensor, autograd: Callable[[Tensor], Tensor], sample: Tensor) -> None:
    """They may differ by rounding only, and by what rounding does at a kink: a ReLU within it of 0 may fall to the
    other side, as it does for autograd itself when the sample moves by as much."""
    scale = float(expected.abs().max())
    worst = float((got - expected).abs().max())
    if worst <= 1e-4 * scale + 1e-12:
        return
    rng = torch.Generator().manual_seed(0)
    own = 0.0
    for _ in range(WOBBLES):
        moved = sample * (1 + ROUNDING * torch.randn(sample.shape, generator=rng))
        own = max(own, float((autograd(moved) - expected).abs().max()))
    alike = float(torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0))
    if not (worst <= 4 * own and alike >= ALIKE):
        raise UserError(
            f"the traced gradient differs from autograd by {worst:.3g} (largest entry {scale:.3g}), and autograd "
            f"from itself by {own:.3g} where the sample moves by rounding"
        )
