"""A classifier's forward pass with its batch normalisation folded into the layers before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from casemate.deploy.decompositions import forward_table
from casemate.deploy.tracing import trace

aten = torch.ops.aten
FULL = 2**63 - 1  # the end of a slice without one
NORMS = (aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default)


def forward_graph(function: Callable[[Tensor], Any], sample: Tensor) -> fx.GraphModule:
    """`function` as a flat graph with every eval-mode batch normalisation that directly follows a convolution or a
    linear layer folded into that layer's weight and bias.

    The products are taken in float64 and rounded once, so the folded network differs from the given one by
    float32 rounding only. The function's own weights are left as they are.
    """
    with torch.no_grad():
        graph = trace(function, sample, forward_table())
    for number, node in enumerate(list(graph.graph.nodes)):
        if node.target is aten.constant_pad_nd.default:
            _convolve_shortcut(graph, node, number)
    for number, node in enumerate(list(graph.graph.nodes)):
        if node.target in NORMS and not _fold(graph, node, number):
            _fold_scale(graph, node, number)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def _fold(graph: fx.GraphModule, norm: fx.Node, number: int) -> bool:
    """Into the layer before. False if there is none, or someone else also reads that layer's output."""
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    found, scale_shift = _weight_and_bias(graph, layer), _scale_and_shift(graph, norm)
    if len(layer.users) != 1 or found is None or scale_shift is None:
        return False
    weight, bias = found
    scale, shift = scale_shift
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    offset = shift if bias is None else shift + bias.double() * scale
    with graph.graph.inserting_before(layer):
        w = _store(graph, f"fused{number}_weight", folded, weight)
        b = _store(graph, f"fused{number}_bias", offset, weight)
        made = graph.graph.call_function(layer.target, (layer.args[0], w, b, *layer.args[3:]))  # type: ignore[arg-type]
    made.meta = dict(layer.meta)
    _replace_norm(norm, made)
    return True


def _fold_scale(graph: fx.GraphModule, norm: fx.Node, number: int) -> None:
    """Before an activation (pre-activation networks): relu(s x + t) = s relu(x + t / s) for s > 0, and the next
    layers' weights take s. One sum is left of the normalisation, and nothing of its gradient."""
    results = [u for u in norm.users if u.args[1] == 0]
    readers = [r for result in results for r in result.users]
    layers = [user for relu in readers for user in relu.users]
    scale_shift = _scale_and_shift(graph, norm)
    if scale_shift is None or not bool((scale_shift[0] > 0).all()):
        return
    if any(r.target is not aten.relu.default for r in readers) or not layers:
        return
    if any(_weight_and_bias(graph, layer) is None or layer.args[0] not in readers for layer in layers):
        return
    if any(layer.target is aten.convolution.default and layer.args[8] != 1 for layer in layers):
        return
    scale, shift = scale_shift
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    shape = [1, -1, *[1] * (x.meta["val"].dim() - 2)]
    with graph.graph.inserting_before(norm):
        offset = _store(graph, f"fused{number}_shift", (shift / scale).view(shape), x.meta["val"])
        moved = graph.graph.call_function(aten.add.Tensor, (x, offset))
    moved.meta = dict(x.meta)
    for place, layer in enumerate(layers):
        weight, _ = _weight_and_bias(graph, layer) or (scale, None)
        with graph.graph.inserting_before(layer):
            scaled = weight.double() * scale.view(1, -1, *[1] * (weight.dim() - 2))
            layer.update_arg(1, _store(graph, f"fused{number}_{place}", scaled, weight))
    _replace_norm(norm, moved)


def _replace_norm(norm: fx.Node, made: fx.Node) -> None:
    for user in list(norm.users):  # the results are (normalised, saved mean, saved deviation)
        if user.args[1] == 0:
            user.replace_all_uses_with(made)


def _store(graph: fx.GraphModule, name: str, value: Tensor, like: Tensor) -> fx.Node:
    graph.register_buffer(name, value.to(like.dtype).contiguous())
    return graph.graph.get_attr(name)


def _convolve_shortcut(graph: fx.GraphModule, padded: fx.Node, number: int) -> None:
    """Every s-th pixel, with zero channels added (the parameter-free shortcut of a ResNet), as a strided 1x1
    convolution with a 0/1 weight: the same numbers, and ONNX Runtime keeps its blocked layout across it."""
    strides: dict[Any, Any] = {2: 1, 3: 1}
    node: Any = padded.args[0]
    x = None
    while isinstance(node, fx.Node) and node.target is aten.slice.Tensor and len(node.args) == 5:
        x, dim, start, end, step = node.args
        if strides.get(dim) != 1 or start != 0 or end != FULL:
            return
        strides[dim], node = step, x
    given: Any = padded.args[1]
    pad, value = [*given, *[0] * 6][:6], padded.args[2] if len(padded.args) > 2 else 0
    if not isinstance(x, fx.Node) or any(pad[:4]) or min(pad) < 0 or value != 0 or x.meta["val"].dim() != 4:
        return
    channels = x.meta["val"].shape[1]
    weight = torch.eye(channels, dtype=x.meta["val"].dtype)
    weight = torch.nn.functional.pad(weight, (0, 0, pad[4], pad[5])).view(-1, channels, 1, 1)
    graph.register_buffer(f"shortcut{number}", weight)
    stride = [strides[2], strides[3]]
    with graph.graph.inserting_before(padded):
        arguments = (x, graph.graph.get_attr(f"shortcut{number}"), None, stride, [0, 0], [1, 1], False, [0, 0], 1)
        made = graph.graph.call_function(aten.convolution.default, arguments)
    made.meta = dict(padded.meta)
    padded.replace_all_uses_with(made)


def _weight_and_bias(graph: fx.GraphModule, layer: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """Of a convolution or linear layer with constant weights; both have the outputs first."""
    forward = layer.target is aten.convolution.default and not layer.args[6]
    if not forward and layer.target is not aten.linear.default:
        return None
    weight, bias = _constant(graph, layer.args[1]), _constant(graph, layer.args[2])
    if weight is None or (bias is None and layer.args[2] is not None):
        return None
    return weight, bias


def _scale_and_shift(graph: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The normalisation as x * scale + shift, in float64."""
    weight, bias, mean, var = (_constant(graph, a) for a in norm.args[1:5])
    training = norm.target is aten.native_batch_norm.default and norm.args[5]
    eps = norm.args[-1]
    if mean is None or var is None or training or not isinstance(eps, float):
        return None
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = getattr(graph, str(node.target))
        return value.detach() if isinstance(value, Tensor) else None
    return None
