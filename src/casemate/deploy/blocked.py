"""Keeps a backward pass in ONNX Runtime's blocked CPU layout (NCHWc), where its convolutions are fastest.

The runtime enters that layout at a convolution or a pooling and stays in it through element-wise operators whose
operands are all in it. A residual network's backward pass starts outside (from the mean over the map, and after each
strided layer), and one operand outside pulls every sum along the skip connections out again, at the price of two
reorderings per block. A 1x1 max pooling with stride 1, which changes no value, is put where the gradient should
enter. On other runtimes it is a copy of one map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
CHANNELS = 16  # the largest block
UNARY = (aten.relu.default, aten.clamp.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor)


def enter_blocked_layout(graph: fx.GraphModule) -> None:
    """In place: each gradient map that a convolution and a sum both read enters the blocked layout if it can."""
    blocked: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        if _is_blocked(node, blocked):
            blocked.add(node)
        elif node.target is aten.mul.Tensor and _is_map(node) and _wanted(node):
            outside = [a for a in node.args if a not in blocked]
            if len(outside) == 1 and _is_map(outside[0]):
                node.replace_input_with(outside[0], _copy(graph, outside[0]))
                blocked.add(node)
            else:
                copy = _copy(graph, node)
                node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
                blocked.add(copy)
    graph.graph.lint()
    graph.recompile()


def _copy(graph: fx.GraphModule, node: Any) -> fx.Node:
    with graph.graph.inserting_after(node):
        copy = graph.graph.call_function(aten.max_pool2d.default, (node, [1, 1], [1, 1]))
    copy.meta = dict(node.meta)
    return copy


def _is_map(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] % CHANNELS == 0 and value.shape[2] > 1


def _is_blocked(node: fx.Node, blocked: set[fx.Node]) -> bool:
    if not _is_map(node):
        return False
    if node.target is aten.convolution.default:
        return not node.args[6]
    if node.target in UNARY or (node.target is aten.mul.Tensor and not isinstance(node.args[1], fx.Node)):
        return node.args[0] in blocked
    return node.target in BINARY and all(a in blocked for a in node.args)


def _wanted(node: fx.Node) -> bool:
    kinds = {user.target for user in node.users}
    return aten.add.Tensor in kinds and aten.convolution.default in kinds
