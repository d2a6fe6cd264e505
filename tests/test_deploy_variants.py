"""Half precision and 8-bit variants of a file: named in it, near the original, refused where they mislead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from casemate.data import Loaded
from casemate.deploy.export import ExportOptions, export_system
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.variants import make_variant
from casemate.errors import UserError
from casemate.system import TorchSystem
from tests.deploy_toys import ABOUT, fitted_system


@pytest.fixture(scope="module")
def system(digits: Loaded) -> TorchSystem:
    return fitted_system(digits)


@pytest.fixture(scope="module")
def train(digits: Loaded) -> np.ndarray:
    return digits[1].images[:100].transpose(0, 3, 1, 2).astype(np.float32) / 255


@pytest.fixture(scope="module")
def plain(system: TorchSystem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variants") / "plain.onnx"
    export_system(system, path, ABOUT, form="plain", options=ExportOptions(layout="uint8-nhwc"))
    return path


def test_variants_say_what_they_are_and_answer_nearly_the_same(
    plain: Path, train: np.ndarray, digits: Loaded, tmp_path: Path
) -> None:
    x = torch.from_numpy(np.ascontiguousarray(digits[2].images.transpose(0, 3, 1, 2))).float() / 255
    whole = OnnxSystem(plain, "cpu")
    for variant, near, kinds in (("float16", 0.99, {"Cast"}), ("int8", 0.95, {"QuantizeLinear", "DequantizeLinear"})):
        path = tmp_path / f"plain.{variant}.onnx"
        make_variant(plain, path, variant, train)  # type: ignore[arg-type]
        file = OnnxSystem(path, "cpu")
        assert file.metadata is not None and file.metadata.variant == variant
        assert file.metadata.about == ABOUT and file.metadata.layout == "uint8-nhwc"
        assert float((file.decide(x) == whole.decide(x)).float().mean()) > near
        assert not torch.equal(file.logits(x), whole.logits(x))
        assert kinds <= {node.op_type for node in onnx.load(path).graph.node}
        assert path.stat().st_size < (0.6 if variant == "float16" else 0.5) * plain.stat().st_size
        again = tmp_path / "again.onnx"
        make_variant(plain, again, variant, train)  # type: ignore[arg-type]
        assert again.read_bytes() == path.read_bytes()
        with pytest.raises(UserError, match=f"is a {variant} variant already"):
            make_variant(path, again, "int8", train)


def test_a_purifying_file_has_a_half_but_no_int8(system: TorchSystem, train: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "imt.onnx"
    export_system(system, path, ABOUT)
    with pytest.raises(UserError, match="has no int8 variant: the purification moves by the sign of a gradient"):
        make_variant(path, tmp_path / "a.onnx", "int8", train)
    make_variant(path, tmp_path / "a.onnx", "float16", train)
    found = OnnxSystem(tmp_path / "a.onnx", "cpu").run(train)
    expected = OnnxSystem(path, "cpu").run(train)
    apart = np.abs(found["manifold_score"] - expected["manifold_score"])
    assert 0 < apart.mean() < 0.01 and apart.max() < 0.1  # a critic whose score spreads over the whole of [0, 1]


def test_a_foreign_file_is_refused(plain: Path, train: np.ndarray, tmp_path: Path) -> None:
    model = onnx.load(plain)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="was not exported by casemate"):
        make_variant(tmp_path / "a.onnx", tmp_path / "b.onnx", "float16", train)
    assert not (tmp_path / "b.onnx").exists()
