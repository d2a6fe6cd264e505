"""Gradients of pooling in operators that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from casemate.errors import UserError

PoolMode = Literal["auto", "scatter", "mask"]

aten = torch.ops.aten


def pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _pooling(x: Tensor, kernel: Any, stride: Any, padding: Any) -> tuple[tuple[int, int], ...]:
    k = pair(kernel)
    return k, (pair(stride) if stride else k), pair(padding)


def max_pool_backward(
    mode: PoolMode, g: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
    indices: Tensor,
) -> Tensor:  # fmt: skip
    k, s, p = _pooling(x, kernel, stride, padding)
    tiled = k == s and p == (0, 0) and pair(dilation) == (1, 1) and not ceil_mode
    if mode != "scatter" and tiled:
        return _tiled_max_backward(g, x, k)
    if mode == "mask":
        return _one_hot_max_backward(g, x, indices, k, s, p, pair(dilation))
    n, c, h, w = x.shape
    flat = x.new_zeros(n, c, h * w).scatter_add(2, indices.reshape(n, c, -1), g.reshape(n, c, -1))
    return flat.reshape(x.shape)


def _tiled_max_backward(g: Tensor, x: Tensor, k: tuple[int, int]) -> Tensor:
    """Windows side by side: a pixel gets the gradient if it equals its window's maximum and is the first to do so.

    No index tensor: MaxPool with indices is ten times slower than without in ONNX Runtime.
    """
    rows, columns = g.shape[2] * k[0], g.shape[3] * k[1]
    inner = x[:, :, :rows, :columns]
    top = stretch(aten.max_pool2d(inner, list(k), list(k)), rows, columns)
    # the earlier a place in its window, the higher its rank; 0 for those below the maximum
    order = torch.arange(k[0] * k[1], 0, -1, dtype=x.dtype).reshape(k).tile(g.shape[2], g.shape[3])
    rank = (inner == top).to(x.dtype) * order
    first = rank == stretch(aten.max_pool2d(rank, list(k), list(k)), rows, columns)
    out = first.to(g.dtype) * stretch(g, rows, columns)
    if (rows, columns) != tuple(x.shape[2:]):
        out = aten.constant_pad_nd(out, [0, x.shape[3] - columns, 0, x.shape[2] - rows], 0.0)
    return out


def stretch(t: Tensor, rows: int, columns: int) -> Tensor:
    """Each pixel repeated over its window."""
    # with the scales given the exporter writes constants instead of computing the size at run time
    scales = (rows / t.shape[2], columns / t.shape[3])
    out: Tensor = aten.upsample_nearest2d(t, [rows, columns], *scales)
    return out


def _one_hot_max_backward(g: Tensor, x: Tensor, indices: Tensor, k: Any, s: Any, p: Any, d: Any) -> Tensor:
    """Overlapping windows without a scatter: a mask per place in the window, placed by a transposed convolution."""
    n, c, h, w = x.shape
    rows = torch.arange(g.shape[2]).reshape(-1, 1) * s[0] - p[0]
    columns = torch.arange(g.shape[3]).reshape(1, -1) * s[1] - p[1]
    parts = [
        (indices == (rows + i * d[0]) * w + columns + j * d[1]).to(g.dtype) * g
        for i in range(k[0]) for j in range(k[1])
    ]  # fmt: skip
    stacked = torch.stack(parts, 2).reshape(n, c * len(parts), g.shape[2], g.shape[3])
    place = torch.eye(len(parts), dtype=g.dtype).reshape(len(parts), 1, *k).tile(c, 1, 1, 1)
    rest = [
        size - ((out - 1) * st - 2 * pad + di * (ke - 1) + 1)
        for size, out, st, pad, di, ke in zip((h, w), g.shape[2:], s, p, d, k, strict=True)
    ]
    crop = [max(0, -r) for r in rest]  # a ceil-mode window that hangs over the edge
    grown = aten.convolution(stacked, place, None, list(s), list(p), list(d), True, [max(0, r) for r in rest], c)
    out: Tensor = grown[:, :, : grown.shape[2] - crop[0], : grown.shape[3] - crop[1]] if any(crop) else grown
    return out


def avg_pool_backward(
    g: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool, divisor: Any
) -> Tensor:
    k, s, p = _pooling(x, kernel, stride, padding)
    if ceil_mode:
        raise UserError("average pooling with ceil_mode has no gradient in ONNX here; pad the input instead")
    size = (x.shape[2], x.shape[3])
    if include_pad or p == (0, 0) or divisor:
        g = g / (divisor or k[0] * k[1])
    else:
        g = g / aten.avg_pool2d(torch.ones(1, 1, *size), list(k), list(s), list(p), False, True, 1)
    if size == k and p == (0, 0):
        return g.expand(x.shape)
    rest = [n - ((out - 1) * a - 2 * b + c) for n, out, a, b, c in zip(size, g.shape[2:], s, p, k, strict=True)]
    if k == s and p == (0, 0) and rest == [0, 0]:
        return stretch(g, *size)
    ones = torch.ones(x.shape[1], 1, *k, dtype=g.dtype)
    out: Tensor = aten.convolution(g, ones, None, list(s), list(p), [1, 1], True, rest, x.shape[1])
    return out


def adaptive_avg_pool_backward(g: Tensor, x: Tensor) -> Tensor:
    h, w, rows, columns = x.shape[-2], x.shape[-1], g.shape[-2], g.shape[-1]
    if h % rows or w % columns:
        raise UserError(f"adaptive average pooling from {h} x {w} to {rows} x {columns} is uneven: not exportable")
    g = g / ((h // rows) * (w // columns))
    return g.expand(x.shape) if (rows, columns) == (1, 1) else stretch(g, h, w)
