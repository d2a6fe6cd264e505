"""Smaller variants of an exported file: half precision, and 8-bit integers. Each is another function than the file it
comes from, so it is offered only with robust accuracy of its own."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from casemate.deploy.export import as_layout
from casemate.deploy.metadata import Layout, Metadata, Variant
from casemate.errors import UserError

CALIBRATION_BATCH = 50


def make_variant(path: Path, out: Path, variant: Variant, calibration: np.ndarray) -> None:
    """Write `out`, the file at `path` as `variant`; the metadata say so.

    "float16": every tensor inside, while inputs and outputs stay float32. "int8": weights by channel and activations
    as 8-bit integers (static QDQ), their ranges from `calibration`, images N x C x H x W float32 in [0, 1] of the
    training set. Raises UserError for a file that is none of ours, or that has no such variant.
    """
    import onnx

    model = onnx.load(path)
    strings = {entry.key: entry.value for entry in model.metadata_props}
    metadata = Metadata.read(strings, path)
    if metadata is None:
        raise UserError(f"{path} was not exported by casemate")
    if metadata.variant != "float32":
        raise UserError(f"{path} is a {metadata.variant} variant already; make variants of the float32 file")
    if variant == "int8" and metadata.form in ("imt", "limited"):
        raise UserError(
            f"{path.name} has no int8 variant: the purification moves by the sign of a gradient that shares the "
            "classifier's weights, and quantised weights give it other signs"
        )
    made = _half(model) if variant == "float16" else _quantised(path, calibration, metadata.layout)
    del made.metadata_props[:]
    for key, value in sorted({**strings, "variant": variant}.items()):
        made.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(made, full_check=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_bytes(made.SerializeToString(deterministic=True))
    temporary.replace(out)


def _half(model: Any) -> Any:
    import onnx_ir
    from onnx_ir.passes.common import TopologicalSortPass
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that half precision cuts
        proto = convert_float_to_float16(model, keep_io_types=True)
    _drop_doubles(proto.graph)
    del proto.graph.value_info[:]  # of some values it still names the old type
    made = onnx_ir.from_proto(proto)
    TopologicalSortPass()(made)  # the converter leaves its casts at the end
    return onnx_ir.to_proto(made)


def _drop_doubles(graph: Any) -> None:
    """The converter writes the cast of a value once for each of its readers, under one name."""
    seen: set[str] = set()
    for node in list(graph.node):
        if set(node.output) <= seen:
            graph.node.remove(node)
        seen.update(node.output)


def _quantised(path: Path, calibration: np.ndarray, layout: Layout) -> Any:
    import logging

    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            given = as_layout(torch.from_numpy(calibration), layout).numpy()
            parts = range(0, len(given), CALIBRATION_BATCH)
            self.left = iter([{"image": given[at : at + CALIBRATION_BATCH]} for at in parts])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # it asks for a preprocessing that the export has done
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "a.onnx"
            quantize_static(
                path, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )  # fmt: skip
            return onnx.load(out)
    finally:
        logger.setLevel(level)
