"""Backward operators rewritten in terms of operators that ONNX has.

A traced gradient contains ATen operators such as `convolution_backward` that no ONNX runtime for inference offers.
`table()` maps each one to a function that computes the same from convolutions, element-wise operators and
resizing. Every function follows PyTorch's own formula, ties included: the first maximum of a pooling window wins,
the gradient of ReLU at 0 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from casemate.deploy import pooling
from casemate.deploy.pooling import PoolMode, pair, stretch
from casemate.errors import UserError

ConvMode = Literal["auto", "transpose", "flip"]
Table = dict[Any, Callable[..., Any]]

aten = torch.ops.aten
STEEP = 1e38  # clip(STEEP x, 0, 1) is 1 for every positive normal float32 (below 1e-38: a fraction)
BLOCK = 8  # channels of ONNX Runtime's blocked CPU convolution; other counts take its slow path

# PyTorch's own decompositions: element-wise formulas, and reductions of softmax and layer normalisation.
STANDARD = (
    aten.elu_backward, aten.gelu_backward, aten.hardsigmoid_backward, aten.hardswish_backward,
    aten.hardtanh_backward, aten.leaky_relu_backward, aten.log_sigmoid_backward, aten.log_sigmoid_forward,
    aten.mish_backward, aten.sigmoid_backward, aten.softplus_backward, aten.tanh_backward,
    aten._log_softmax_backward_data, aten._softmax_backward_data, aten._prelu_kernel_backward,
    aten.native_layer_norm, aten.native_layer_norm_backward, aten.native_group_norm,
    aten.native_group_norm_backward,
)  # fmt: skip


def table(conv: ConvMode = "auto", pool: PoolMode = "auto") -> Table:
    """Decompositions by operator overload.

    conv: the input gradient of a convolution is a transposed convolution sharing the forward weight ("transpose"),
      or for stride 1 an ordinary one with the kernel flipped ("flip"). "auto" flips where ONNX Runtime's blocked
      convolution applies, that is channel counts that are multiples of 8.
    pool: the gradient of max pooling by scattering on the indices ("scatter"), or by comparing with the maximum
      ("mask": deterministic on a GPU, no index tensor). "auto" compares where windows do not overlap.
    """
    made: Table = dict(get_decompositions(STANDARD))

    def convolution_backward(*args: Any) -> tuple[Tensor | None, None, None]:
        return _convolution_backward(conv, *args)

    def max_pool_backward(*args: Any) -> Tensor:
        return pooling.max_pool_backward(pool, *args)

    made |= forward_table()
    made |= {
        aten.convolution_backward.default: convolution_backward,
        aten.threshold_backward.default: _threshold_backward,
        aten.silu_backward.default: _silu_backward,
        aten.native_batch_norm.default: _batch_norm,
        aten._native_batch_norm_legit_no_training.default: _batch_norm_eval,
        aten.native_batch_norm_backward.default: _batch_norm_backward,
        aten.max_pool2d_with_indices_backward.default: max_pool_backward,
        aten.avg_pool2d_backward.default: pooling.avg_pool_backward,
        aten._adaptive_avg_pool2d_backward.default: pooling.adaptive_avg_pool_backward,
        aten.slice_backward.default: _slice_backward,
        aten.constant_pad_nd.default: _pad,
        aten.select_backward.default: _select_backward,
        aten.empty_permuted.default: _empty_permuted,
        aten.empty_like.default: _zeros_like,
        aten.zeros_like.default: _zeros_like,
        aten.ones_like.default: _ones_like,
    }
    return made


def forward_table() -> Table:
    """Decompositions that are of use in a forward pass as well."""
    return {aten.convolution.default: _convolution, aten.select.int: _select}


# --- convolution --------------------------------------------------------------------------------------------


def _is_dense(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool, groups: int) -> bool:
    """True if the output is 1 x 1, every input pixel is used at most once and nothing is padded but a 1 x 1 input."""
    if transposed or groups != 1 or pair(dilation) != (1, 1) or x.dim() != 4:
        return False
    size, kernel, pad = (x.shape[2], x.shape[3]), (w.shape[2], w.shape[3]), pair(padding)
    whole = size == kernel and pad == (0, 0)
    single = size == (1, 1) and kernel == (2 * pad[0] + 1, 2 * pad[1] + 1)
    return bool(whole or single)


def _dense_weight(x: Tensor, w: Tensor) -> Tensor:
    """The (out, in) matrix of a dense convolution; on a 1 x 1 map only the centre tap of the kernel ever acts."""
    if x.shape[2:] != w.shape[2:]:
        w = w[:, :, w.shape[2] // 2, w.shape[3] // 2]
    return w.reshape(w.shape[0], -1)


def _convolution(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    if not _is_dense(x, w, stride, padding, dilation, transposed, groups):
        return NotImplemented  # type: ignore[no-any-return]
    matrix, flat = _dense_weight(x, w), x.reshape(x.shape[0], -1)
    out = flat @ matrix.t() if bias is None else torch.addmm(bias, flat, matrix.t())
    return out.reshape(x.shape[0], w.shape[0], 1, 1)


def _convolution_backward(
    mode: ConvMode, g: Tensor, x: Tensor, w: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:  # fmt: skip
    """The input gradient; weights are constants of the graph."""
    if not mask[0]:
        return None, None, None
    if transposed:
        raise UserError("the gradient of a transposed convolution has no ONNX form here")
    if _is_dense(x, w, stride, padding, dilation, transposed, groups):
        return (g.reshape(g.shape[0], -1) @ _dense_weight(x, w)).reshape(x.shape), None, None
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    kernel = list(w.shape[2:])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    margin = [r - p for r, p in zip(reach, padding, strict=True)]
    flippable = groups == 1 and set(stride) == {1} and min(margin) >= 0
    blocked = w.shape[0] % BLOCK == 0 and w.shape[1] % BLOCK == 0
    if flippable and (mode == "flip" or (mode == "auto" and blocked)):
        flipped = w.transpose(0, 1).flip(list(range(2, w.dim())))
        return aten.convolution(g, flipped, None, stride, margin, dilation, False, [0] * len(stride), 1), None, None
    rest = [
        size - ((out - 1) * s - 2 * p + r + 1)
        for size, out, s, p, r in zip(x.shape[2:], g.shape[2:], stride, padding, reach, strict=True)
    ]
    return aten.convolution(g, w, None, stride, padding, dilation, True, rest, groups), None, None


# --- element-wise -------------------------------------------------------------------------------------------


def _threshold_backward(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    # For ReLU x is its output and the second ReLU is dropped. A scaled and clipped ReLU is a single ONNX operator
    # (HardSigmoid) that stays in ONNX Runtime's blocked layout; a comparison would reorder every map twice.
    if threshold == 0:
        return g * (torch.relu(x) * STEEP).clamp(0, 1)
    return g * (x > threshold).to(g.dtype)


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * (s * (1 + x * (1 - s)))


# --- batch normalisation with running statistics ------------------------------------------------------------


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape([1, -1] + [1] * (x.dim() - 2))


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if training or mean is None or var is None:
        raise UserError("batch normalisation with batch statistics cannot be exported; call eval() first")
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    out = x * _per_channel(scale, x) + _per_channel(shift, x)
    return out, x.new_zeros(0), x.new_zeros(0)


def _batch_norm_eval(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, weight, bias, mean, var, False, momentum, eps)


def _batch_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, var: Tensor | None, save_mean: Any,
    save_invstd: Any, train: bool, eps: float, mask: Sequence[bool],
) -> tuple[Tensor, None, None]:  # fmt: skip
    if train or var is None:
        raise UserError("batch normalisation with batch statistics cannot be exported; call eval() first")
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    return g * _per_channel(scale, x), None, None


# --- shapes -------------------------------------------------------------------------------------------------


def _slice_backward(g: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Zeros around; with a step, each entry repeated over its stride and all but the first masked."""
    dim = dim % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    if step > 1:
        first = (torch.arange(g.shape[dim] * step) % step == 0).to(g.dtype)
        mask = first.reshape([-1 if d == dim else 1 for d in range(g.dim())])
        g = _repeat(g, dim, step) * mask
        if g.shape[dim] > sizes[dim] - start:
            g = g.narrow(dim, 0, sizes[dim] - start)
    behind = sizes[dim] - start - g.shape[dim]
    if start == 0 and behind == 0:
        return g
    out: Tensor = aten.constant_pad_nd(g, [0] * (2 * (g.dim() - 1 - dim)) + [start, behind], 0.0)
    return out


def _repeat(g: Tensor, dim: int, times: int) -> Tensor:
    """Each entry of dimension `dim` `times` in a row."""
    if g.dim() == 4 and dim >= 2:
        size = [g.shape[d] * (times if d == dim else 1) for d in (2, 3)]
        return stretch(g, *size)
    shape = list(g.shape)
    wide = g.unsqueeze(dim + 1).expand([*shape[: dim + 1], times, *shape[dim + 1 :]])
    return wide.reshape([*shape[:dim], shape[dim] * times, *shape[dim + 1 :]])


def _pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """Cropping, which is padding by less than nothing, as a slice of just the dimensions concerned."""
    if all(p >= 0 for p in pad):
        return NotImplemented  # type: ignore[no-any-return]
    for number in range(len(pad) // 2):
        dim, before, after = x.dim() - 1 - number, min(pad[2 * number], 0), min(pad[2 * number + 1], 0)
        if before or after:
            x = x.narrow(dim, -before, x.shape[dim] + before + after)
    rest = [max(p, 0) for p in pad]
    out: Tensor = aten.constant_pad_nd(x, rest, value) if any(rest) else x
    return out


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    return x.squeeze(dim) if x.shape[dim] == 1 else NotImplemented


def _select_backward(g: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    return _slice_backward(g.unsqueeze(dim), sizes, dim, index % sizes[dim], 0, 1)


def _empty_permuted(size: Any, layout: Any, **options: Any) -> Tensor:
    # uninitialised dummies would otherwise reach the exporter
    return torch.zeros([*size], dtype=options.get("dtype"))


def _zeros_like(x: Tensor, **options: Any) -> Tensor:
    return _filled(x, 0, options)


def _ones_like(x: Tensor, **options: Any) -> Tensor:
    return _filled(x, 1, options)


def _filled(x: Tensor, value: int, options: dict[str, Any]) -> Tensor:
    # from the shape alone, so that the result does not count as depending on x
    return torch.full(x.shape, value, dtype=options.get("dtype") or x.dtype)
