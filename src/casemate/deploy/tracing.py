"""A function of a batch of images as a flat graph of ATen operators."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from casemate.deploy.simplify import simplify
from casemate.errors import UserError

OPERATOR = re.compile(r"(?:aten|torchvision|prims)(?:::|\.)\w+(?:\.\w+)?")


def trace(
    function: Callable[[Tensor], Any], sample: Tensor, decompositions: dict[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """`function` as a module of pure operators, for any batch size and otherwise the shape of `sample`.

    Weights that the function closes over become attributes of the module, shared with their owner. Raises
    UserError naming the operator that cannot be traced, for example where Python code depends on pixel values.
    """
    # not 1, which would become a constant of the graph, nor another size, which would be taken for the same symbol
    batch = next(n for n in range(2, 99) if n not in sample.shape[1:])
    sample = sample.detach()[:1].expand(batch, *sample.shape[1:]).contiguous()

    def fixed(x: Tensor) -> Any:
        for size in x.shape[1:]:
            int(size)  # a guard: every size but the batch becomes a number
        return function(x)

    # remove="mutations" only: with views removed too, the trace holds copies that the ONNX exporter refuses
    pure = torch.func.functionalize(fixed, remove="mutations")
    make = make_fx(pure, decomposition_table=decompositions, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make(sample)
    except UserError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"the network cannot be traced: {operator_named(str(error))}") from error
    image = next(n for n in graph.graph.nodes if n.op == "placeholder")
    if is_concrete_int(image.meta["val"].shape[0]):
        raise UserError("the network computes with the batch size, so it cannot be traced for any batch")
    return simplify(graph)


def operator_named(message: str) -> str:
    """The operator that an error message of PyTorch is about, else the message's first line."""
    found = OPERATOR.search(message)
    if found:
        return f"operator {found[0].replace('::', '.')} has no exportable form"
    lines = message.strip().splitlines()
    return lines[0] if lines else "unknown cause"
