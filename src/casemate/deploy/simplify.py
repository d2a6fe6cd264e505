"""Clean-up of a traced graph: fixed sizes become numbers, repeated work and constant work disappear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

aten = torch.ops.aten
SHAPING = (aten.view.default, aten.expand.default, aten.slice.Tensor)
FOLD_LIMIT = 1 << 16  # elements; a larger constant is left to be computed by the runtime when it loads the file


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """In place. The weights stay the tensors they were; only results smaller than what they come from are stored."""
    _fix_sizes(graph)
    _drop_neutral(graph)
    _merge_repeated(graph)
    _use_linear(graph)
    _fold_rows(graph)
    _fold_constants(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _fix_sizes(graph: fx.GraphModule) -> None:
    """Sizes that the trace fixed become integers; every way of asking for the batch size becomes one node."""
    image = next(n for n in graph.graph.nodes if n.op == "placeholder")
    with graph.graph.inserting_after(image):
        batch = graph.graph.call_function(aten.sym_size.int, (image, 0))
    batch.meta["val"] = image.meta["val"].shape[0]
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node is batch or not isinstance(value, int | torch.SymInt):
            continue
        if is_concrete_int(value):
            node.replace_all_uses_with(int(value))
        elif str(value) == str(batch.meta["val"]):
            node.replace_all_uses_with(batch)
    graph.graph.eliminate_dead_code()


def _drop_neutral(graph: fx.GraphModule) -> None:
    """Reshapes to the same shape, and a transpose of a transpose."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target is aten.t.default and source.target is aten.t.default:
            node.replace_all_uses_with(source.args[0])
        elif (
            node.target in (aten.alias.default, aten.detach.default)
            or (node.target in SHAPING and _same_shape(node, source))
            or (node.target is aten.relu.default and source.target is aten.relu.default)
        ):
            node.replace_all_uses_with(source)
    graph.graph.eliminate_dead_code()


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta.get("val"), source.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
        return False
    return all(str(m) == str(n) for m, n in zip(a.shape, b.shape, strict=True))


def _merge_repeated(graph: fx.GraphModule) -> None:
    """One node for equal calls on equal arguments: all operators here are pure."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _use_linear(graph: fx.GraphModule) -> None:
    """x @ W.t() + b as `linear`, which ONNX writes as one Gemm that reads W as it is stored."""
    for node in graph.graph.nodes:
        if node.target is aten.addmm.default and len(node.args) == 3 and not node.kwargs:
            bias, x, matrix = node.args
        elif node.target is aten.mm.default:
            bias, (x, matrix) = None, node.args
        else:
            continue
        if matrix.target is not aten.t.default:
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(aten.linear.default, (x, matrix.args[0], bias))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    graph.graph.eliminate_dead_code()


def _fold_rows(graph: fx.GraphModule) -> None:
    """What depends on the batch size alone and is the same for every sample (the start of a backward pass: ones,
    and ones times weights) becomes one constant row, which products and sums broadcast."""
    asked = (n for n in graph.graph.nodes if n.target is aten.sym_size.int)
    batch = next((n for n in asked if n.args[0].op == "placeholder"), None)
    if batch is None:
        return
    values: list[dict[fx.Node, Any]] = []
    for size in (1, 2, 3):
        known: dict[fx.Node, Any] = {batch: size}
        for node in graph.graph.nodes:
            _evaluate(graph, node, known)
        values.append(known)
    one, two, three = values
    for number, node in enumerate([n for n in one if n is not batch and n.op == "call_function"]):
        row = one[node]
        users = [u for u in node.users if u not in one]
        if not users or not isinstance(row, Tensor) or row.dim() < 2 or row.numel() > FOLD_LIMIT:
            continue
        if [len(row), len(two[node]), len(three[node])] != [1, 2, 3]:
            continue
        if not all(torch.allclose(row.expand_as(v), v, rtol=1e-5, atol=0) for v in (two[node], three[node])):
            continue
        with graph.graph.inserting_before(node):
            constant = _store(graph, f"row{number}", row)
            full = graph.graph.call_function(aten.expand.default, (constant, [batch, *row.shape[1:]]))
        for user in users:
            broadcasts = user.target in (aten.mul.Tensor, aten.add.Tensor) and _is_batched(user, node)
            user.replace_input_with(node, constant if broadcasts else full)
    graph.graph.eliminate_dead_code()


def _is_batched(user: fx.Node, node: fx.Node) -> bool:
    """True if another operand of `user` has the full shape, so that the constant row broadcasts to it."""
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
    return len(others) == 1 and _same_shape(others[0], user)


def _evaluate(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> None:
    """Adds the node's value to `known` if it needs nothing but what is known already."""
    if node.op == "get_attr":
        known[node] = getattr(graph, str(node.target))
    elif node.op == "call_function" and node not in known and all(n in known for n in node.all_input_nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _store(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph.register_buffer(name, value.detach().clone().contiguous())
    made = graph.graph.get_attr(name)
    made.meta["val"] = value
    return made


def _fold_constants(graph: fx.GraphModule) -> None:
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        _evaluate(graph, node, known)
    kept = [n for n in known if n.op == "call_function" and any(u not in known for u in n.users)]
    sources = [
        [known[n].numel() for n in _ancestors(node) if n.op == "get_attr"] for node in kept
    ]  # before any folds
    for number, (node, sizes) in enumerate(zip(kept, sources, strict=True)):
        value = known[node]
        most = min(FOLD_LIMIT, max(sizes, default=FOLD_LIMIT + 1) - 1)
        if isinstance(value, Tensor) and value.numel() <= most:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_store(graph, f"folded{number}", value))
    graph.graph.eliminate_dead_code()


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
