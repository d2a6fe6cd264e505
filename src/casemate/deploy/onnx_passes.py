"""What is done to the exported model before it is written: one copy of each weight, no local names, fewer nodes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)

from casemate.deploy.decompositions import STEEP


def tidy(model: Any) -> None:
    """In place, on an `onnx_ir.Model`. The result depends on the graph and the weights alone."""
    _fuse_masks(model.graph)
    _fuse_sums(model.graph)
    for make in (
        lambda: DeduplicateInitializersPass(size_limit=1 << 40),
        CommonSubexpressionEliminationPass,
        RemoveUnusedNodesPass,
        ClearMetadataAndDocStringPass,  # stack traces with this machine's paths
        NameFixPass,
    ):
        make()(model)


def _fuse_masks(graph: Any) -> None:
    """clip(STEEP x, 0, 1) as one HardSigmoid."""
    for node in list(graph):
        if node.op_type != "Clip" or [_scalar(v) for v in node.inputs[1:]] != [0.0, 1.0]:
            continue
        product = node.inputs[0].producer()
        if product is None or product.op_type != "Mul" or _scalar(product.inputs[1]) != _scalar32(STEEP):
            continue
        mask = ir.node("HardSigmoid", [product.inputs[0]], {"alpha": STEEP, "beta": 0.0})
        mask.outputs[0].shape, mask.outputs[0].dtype = node.outputs[0].shape, node.outputs[0].dtype
        ir.convenience.replace_nodes_and_values(graph, node, [node], [mask], node.outputs, mask.outputs)


def _fuse_sums(graph: Any) -> None:
    """matrix product + sum as one Gemm whose third operand is the other summand (skip connections of vectors)."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for product, other in (node.inputs, reversed(node.inputs)):
            made = _gemm(product, other)
            if made is not None:
                made.outputs[0].shape, made.outputs[0].dtype = node.outputs[0].shape, node.outputs[0].dtype
                ir.convenience.replace_nodes_and_values(graph, node, [node], [made], node.outputs, made.outputs)
                break


def _gemm(product: Any, other: Any) -> Any:
    source = product.producer()
    if source is None or len(product.uses()) != 1 or product.shape is None or len(product.shape) != 2:
        return None
    if other.shape != product.shape or product.is_graph_output():
        return None
    if source.op_type == "MatMul" and all(v.shape is not None and len(v.shape) == 2 for v in source.inputs):
        return ir.node("Gemm", [*source.inputs, other])
    if source.op_type == "Gemm" and (len(source.inputs) == 2 or source.inputs[2] is None):
        return ir.node("Gemm", [*source.inputs[:2], other], dict(source.attributes))
    return None


def _scalar(value: Any) -> float | None:
    if value is None:  # an input that is left out
        return None
    constant = ir.convenience.get_const_tensor(value)
    return float(constant.numpy()) if constant is not None and constant.size == 1 else None


def _scalar32(value: float) -> float:
    import numpy as np

    return float(np.float32(value))
