"""The parity report passes a true export and names what is wrong with a broken one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from casemate.data import Loaded
from casemate.deploy import parity
from casemate.deploy.export import ExportOptions, export_system, prepare
from casemate.deploy.parity import Labelled, export_with_parity, parity_path, parity_report
from casemate.errors import UserError
from casemate.purification.imt import IMT
from casemate.system import TorchSystem
from tests.deploy_toys import ABOUT, fitted_system

Model = onnx.ModelProto


@pytest.fixture(scope="module")
def system(digits: Loaded) -> TorchSystem:
    return fitted_system(digits)


@pytest.fixture(scope="module")
def test_set(digits: Loaded) -> Labelled:
    return Labelled(digits[2].images, digits[2].labels)


@pytest.fixture(scope="module")
def noisy(test_set: Labelled) -> Labelled:
    """Stands for stored adversarial images: float32, channels first, some of them wrong."""
    rng = np.random.default_rng(0)
    x = test_set.images[:200].transpose(0, 3, 1, 2).astype(np.float32) / 255
    return Labelled((x + 0.25 * rng.standard_normal(x.shape, np.float32)).clip(0, 1), test_set.labels[:200])


@pytest.fixture(scope="module")
def exported(
    system: TorchSystem, test_set: Labelled, noisy: Labelled, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("parity") / "limited.onnx"
    return path, export_with_parity(system, path, ABOUT, test_set, adversarial=noisy, n=400)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


def test_a_true_export_passes_and_every_number_is_there(
    exported: tuple[Path, dict[str, Any]], test_set: Labelled
) -> None:
    path, report = exported
    assert report["passed"] and report["n"] == 400
    checks = by_name(report)
    assert list(checks) == [
        "score", "logits", "probabilities", "signs", "cosine", "varies", "move", "batch", "clean agreement",
        "clean accuracy", "adversarial agreement", "adversarial accuracy",
    ]  # fmt: skip
    for check in checks.values():
        assert check["passed"] and check["detail"]
        assert check["value"] >= check["bound"] if check["at_least"] else check["value"] <= check["bound"]
    assert checks["varies"]["value"] > 0.2
    figures = report["figures"]
    assert figures["gradient"]["zero_images"] == 0 and figures["gradient"]["cosine_least"] > 0.9999
    assert figures["clean"]["n"] == len(test_set) and figures["clean"]["accuracy"] > 0.7
    assert figures["adversarial"]["n"] == 200
    assert figures["adversarial"]["accuracy"] < figures["clean"]["accuracy"]
    assert json.loads(parity_path(path).read_text()) == report
    assert sorted(p.name for p in path.parent.iterdir()) == ["limited.onnx", "limited.parity.json"]


def test_the_report_follows_the_form_of_the_file(system: TorchSystem, test_set: Labelled, tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    options = ExportOptions(layout="uint8-nhwc")
    report = export_with_parity(system, path, ABOUT, test_set, n=100, form="plain", options=options)
    assert report["form"] == "plain"
    names = ["logits", "probabilities", "batch", "clean agreement", "clean accuracy"]
    assert list(by_name(report)) == names
    assert report["figures"]["clean"]["accuracy_torch"] > 0.8


def weight(model: Model, shape: tuple[int, ...]) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if tuple(t.dims) == shape)


def change(tensor: onnx.TensorProto, new: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(new(numpy_helper.to_array(tensor)).astype(np.float32), tensor.name))


def other_weights(model: Model) -> None:
    change(weight(model, (32, 16, 3, 3)), lambda w: w[::-1])


def slightly_other_weights(model: Model) -> None:
    change(weight(model, (48, 512)), lambda w: w * 1.001)


def constant_correction(model: Model) -> None:
    """The gradient as the exporter freezes it on a bad day: that of one image, for all."""
    node = next(n for n in model.graph.node if "gradient" in n.output)
    node.output[:] = ["true gradient" if name == "gradient" else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 8, 8), np.float32), "frozen"))
    insert_after(model, node, "Expand", ["frozen", "s"], "gradient")
    insert_after(model, node, "Shape", ["image"], "s")


def insert_after(model: Model, node: onnx.NodeProto, kind: str, inputs: list[str], output: str) -> None:
    model.graph.node.insert(list(model.graph.node).index(node) + 1, onnx.helper.make_node(kind, inputs, [output]))


def other_way(model: Model) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Sign")
    insert_after(model, node, "Neg", ["signed"], node.output[0])
    node.output[:] = ["signed"]


def no_purification(model: Model) -> None:
    """The classifier reads the image as it came."""
    made = next(n for n in model.graph.node if "purified" in n.output)
    for node in model.graph.node:
        if node is not made:
            node.input[:] = ["image" if name == "purified" else name for name in node.input]


def first_class(model: Model) -> None:
    node = next(n for n in model.graph.node if "probabilities" in n.output)
    node.op_type = "HardSigmoid"
    del node.attribute[:]


@pytest.mark.parametrize(
    ("breakage", "fails"),
    [
        (other_weights, {"score", "logits", "signs", "cosine"}), (slightly_other_weights, {"logits"}),
        (constant_correction, {"signs", "cosine", "varies"}), (other_way, {"move"}), (no_purification, {"logits"}),
        (first_class, {"probabilities"}),
    ],
)  # fmt: skip
def test_a_broken_graph_fails_where_it_is_broken(
    breakage: Callable[[Model], None], fails: set[str], exported: tuple[Path, dict[str, Any]], system: TorchSystem,
    test_set: Labelled, tmp_path: Path,
) -> None:  # fmt: skip
    model = onnx.load(exported[0])
    breakage(model)
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    report = parity_report(system, path, Labelled(test_set.images[:120], test_set.labels[:120]))
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert not report["passed"] and fails <= failed


def test_another_radius_or_rule_than_the_files_fails(
    exported: tuple[Path, dict[str, Any]], system: TorchSystem, test_set: Labelled
) -> None:
    some = Labelled(test_set.images[:60], test_set.labels[:60])
    for attribute, value in (("radius", 0.11), ("band", (0.0, 1.0))):
        changed = prepare(system)
        assert isinstance(changed.purification, IMT)
        setattr(changed.purification, attribute, value)
        checks = by_name(parity_report(changed, exported[0], some))
        assert not checks["move"]["passed"] and checks["score"]["passed"]


def test_a_failed_export_leaves_the_old_file_and_the_report(
    system: TorchSystem, test_set: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"the old one")

    def export_another(system: TorchSystem, path: Path, *rest: Any, **options: Any) -> None:
        changed = prepare(system)
        with torch.no_grad():
            changed.classifier.head.bias.add_(0.5 * torch.arange(10))  # type: ignore[union-attr, operator, arg-type]
        export_system(changed, path, *rest, **options)

    monkeypatch.setattr(parity, "export_system", export_another)
    with pytest.raises(UserError, match=r"a\.onnx is not written: parity failed at 'logits'") as caught:
        export_with_parity(system, path, ABOUT, test_set, n=50, form="plain")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"the old one"
    assert json.loads(parity_path(path).read_text())["passed"] is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.parity.json"]


def test_files_that_cannot_be_compared(system: TorchSystem, test_set: Labelled, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match="not an ONNX"):
        parity_report(system, tmp_path / "text.onnx", test_set)
