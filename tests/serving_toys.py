"""A released model that is made in milliseconds, for tests of what loads and serves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from casemate.deploy.card import MODEL, Card, file_sha256, write
from casemate.deploy.metadata import Metadata
from tests.deploy_toys import ABOUT

SHAPE = (1, 8, 8)
WEIGHTS = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
RATE = {"accuracy": 0.75, "low": 0.7, "high": 0.8, "n": 400}


def write_model(path: Path, shape: tuple[int, int, int] = SHAPE, *, score: bool = True) -> Path:
    """A linear classifier in the form of an exported file; its manifold score is the sigmoid of the mean pixel."""
    weights = np.resize(WEIGHTS, (int(np.prod(shape)), 10))
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceMean", ["flat", "one"], ["mean"], keepdims=0),
        helper.make_node("Sigmoid", ["mean"], ["manifold_score"]),
    ]
    images = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *shape])
    outputs: list[tuple[str, list[Any]]] = [("logits", ["batch", 10]), ("probabilities", ["batch", 10])]
    outputs += [("manifold_score", ["batch"])] * score
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, form) for name, form in outputs]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1]), "one")]
    graph = helper.make_graph(nodes, "toy", [images], made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    strings = Metadata(ABOUT, "limited" if score else "plain", shape, "float32-nchw").strings()
    helper.set_model_props(model, strings)
    onnx.save(model, path)
    return path


def released(folder: Path, shape: tuple[int, int, int] = SHAPE) -> Path:
    """A folder as a release makes it, with invented figures on its card."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_model(folder / MODEL, shape)
    write(Card.model_validate({
        "schema": "casemate-card/1", "file": MODEL, "sha256": file_sha256(path), "size": path.stat().st_size,
        "dataset": ABOUT.dataset, "classes": ABOUT.classes,
        "input": {"name": "image", "shape": shape, "layout": "float32-nchw"},
        "outputs": ("logits", "probabilities", "manifold_score"), "form": "limited", "variant": "float32",
        "threat": {"norm": ABOUT.norm, "radius": ABOUT.radius}, "clean": RATE,
        "robust": {"all": {**RATE, "accuracy": 0.5, "attacks": ["pgd"]}}, "verdict": "ok", "gate": None,
        "provenance": {"profile": "toy", "row": "toy", "mode": "limited", "method": "none", "network": "linear",
                       "data_checksum": "", "seed": None, "epochs": None, "budget": 1.0, "code_version": "0"},
    }), folder)  # fmt: skip
    return folder
