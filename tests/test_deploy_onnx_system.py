"""An .onnx file as a system, ours or foreign; prediction with NumPy; and every file that is not usable is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import casemate
from casemate.attacks.gradient import PGD
from casemate.attacks.transfer import Transfer
from casemate.deploy import session
from casemate.deploy.export import ExportOptions, export_system
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.session import open_session
from casemate.errors import UserError
from casemate.threat import ThreatModel, untargeted
from tests.deploy_toys import ABOUT, SHAPE, imt_system

WEIGHTS = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "limited.onnx"
    export_system(imt_system("interval"), path, ABOUT, options=ExportOptions(purified=True))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    export_system(imt_system(), path, ABOUT, form="plain")
    return path


def foreign(
    path: Path, shape: list[int | str] | None = None, *, kind: int = TensorProto.FLOAT, output: str = "scores",
    inputs: int = 1,
) -> Path:  # fmt: skip
    """A linear classifier of 64 numbers: flatten, cast, multiply."""
    shape = ["n", 1, 8, 8] if shape is None else shape
    nodes = [
        helper.make_node("Cast", ["in0"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], [output]),
    ]
    given = [helper.make_tensor_value_info(f"in{i}", kind, shape) for i in range(inputs)]
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", given, [made], [numpy_helper.from_array(WEIGHTS, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def images(n: int) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(n))


def test_ours_gives_the_systems_logits_for_any_batch(plain: Path) -> None:
    system, original = OnnxSystem(plain, "cpu"), imt_system()
    assert (system.input_shape, system.num_classes, system.classes) == (SHAPE, 10, ABOUT.classes)
    assert system.provider == "CPUExecutionProvider"
    assert system.metadata is not None and system.metadata.about == ABOUT
    for n in (0, 1, 499, 501):
        with torch.no_grad():
            expected = original.classifier(images(n))
        torch.testing.assert_close(system.logits(images(n)), expected, rtol=1e-5, atol=1e-5)
    assert (
        system.decide(images(5)).tolist() == expected[:0].tolist() + original.classifier(images(5)).argmax(1).tolist()
    )


def test_what_it_offers_and_its_views(plain: Path, limited: Path) -> None:
    classifier, purifying = OnnxSystem(plain, "cpu"), OnnxSystem(limited, "cpu")
    assert classifier.offers == {"scores", "labels"}
    assert set(classifier.views()) == {"static", "adaptive"} and not classifier.changes_inference
    assert set(purifying.views()) == {"adaptive"} and purifying.changes_inference
    assert classifier.hash() != purifying.hash() == OnnxSystem(limited, "cpu").hash()
    x = images(6)
    torch.testing.assert_close(purifying.views()["adaptive"].logits(x), purifying.logits(x))


def test_attacks_by_gradient_are_refused_and_transfer_runs(limited: Path) -> None:
    system, x, threat = OnnxSystem(limited, "cpu"), images(8), ThreatModel("linf", 0.1)
    goal = untargeted(system.decide(x))
    with pytest.raises(UserError, match="PGD needs gradient, and limited offers only labels, scores"):
        PGD(steps=2)(system, x, goal, threat)
    result = Transfer(steps=3).with_source(imt_system())(system, x, goal, threat)
    assert bool(threat.contains(result.x_adv, x).all())


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        (["n", 1, 8, 8], TensorProto.FLOAT, (1, 8, 8)), (["n", 8, 8, 1], TensorProto.FLOAT, (1, 8, 8)),
        (["n", 8, 8, 1], TensorProto.UINT8, (1, 8, 8)), ([5, 1, 8, 8], TensorProto.FLOAT, (1, 8, 8)),
        ([1, 1, 4, 16], TensorProto.UINT8, (1, 4, 16)),
    ],
)  # fmt: skip
def test_foreign_files(shape: list[int | str], kind: int, expected: tuple[int, ...], tmp_path: Path) -> None:
    system = OnnxSystem(foreign(tmp_path / "f.onnx", shape, kind=kind), "cpu")
    assert (system.input_shape, system.num_classes, system.classes) == (expected, 3, None)
    levels = (images(12) * 255).round()
    scale = 1 if kind == TensorProto.UINT8 else 255
    found = system.logits((levels / 255).reshape(12, *expected))
    torch.testing.assert_close(found, levels.flatten(1) / scale @ torch.from_numpy(WEIGHTS), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": ["n", 1, "h", 8]}, "channels, height and width must be fixed"),
        ({"shape": ["n", 64]}, "needed is N x C x H x W"), ({"kind": TensorProto.INT64}, "float32 in"),
        ({"shape": ["n", 4, 4, 4]}, "cannot tell where the channels"),
        ({"shape": ["n", 1, 64, 1]}, "cannot tell where the channels"), ({"inputs": 2}, "2 inputs"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_known_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        OnnxSystem(foreign(tmp_path / "f.onnx", **change), "cpu")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_files_that_are_no_models_are_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.onnx does not exist"):
        OnnxSystem(tmp_path / "gone.onnx")
    for content in (b"", b"hello", plain.read_bytes()[:5000]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.onnx is not an ONNX model that can be run") as caught:
            OnnxSystem(tmp_path / "bad.onnx", "cpu")
        assert "\n" not in str(caught.value)
    model = onnx.load(foreign(tmp_path / "f.onnx"))
    model.graph.node[-1].op_type = "Softmax"
    del model.graph.node[-1].input[1]
    model.graph.node.append(helper.make_node("Shape", ["in0"], ["numbers"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("numbers", TensorProto.INT64, None))
    onnx.save(model, tmp_path / "f.onnx")
    with pytest.raises(UserError, match="no output of N x classes float32 logits; outputs: numbers"):
        OnnxSystem(tmp_path / "f.onnx", "cpu")


def test_a_file_that_loads_and_does_not_run_is_refused(tmp_path: Path) -> None:
    model = onnx.load(foreign(tmp_path / "f.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 64]), "one"))
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("one")
    onnx.save(model, tmp_path / "f.onnx")
    with pytest.raises(UserError, match=r"does not run on images \(1, 8, 8\)") as caught:
        OnnxSystem(tmp_path / "f.onnx", "cpu")
    assert "\n" not in str(caught.value)


def test_metadata_that_contradict_the_file_are_refused(plain: Path, tmp_path: Path) -> None:
    for key, value, words in (
        ("classes", '["a", "b"]', "name 2 classes and it has 10"), ("input_shape", "[1, 8, 9]", "export it again"),
        ("schema", "casemate/9", "casemate/9"), ("radius", "wide", "damaged"),
    ):  # fmt: skip
        model = onnx.load(plain)
        next(entry for entry in model.metadata_props if entry.key == key).value = value
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(UserError, match=words):
            OnnxSystem(tmp_path / "m.onnx", "cpu")


def test_a_file_is_not_exported_again(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plain is OnnxSystem; only a PyTorch classifier can be exported"):
        export_system(OnnxSystem(plain, "cpu"), tmp_path / "again.onnx", ABOUT)


def test_images_of_another_shape_are_refused(plain: Path) -> None:
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\), not \(3, 8, 8\)"):
        OnnxSystem(plain, "cpu").logits(torch.rand(2, 3, 8, 8))


def test_a_gpu_that_is_not_there(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert session.gpu_present() == torch.cuda.is_available()
    if session.gpu_present():
        assert open_session(plain, "cuda").get_providers()[0] == "CUDAExecutionProvider"
        return
    with pytest.raises(UserError, match=r"GPU|CUDA"):
        open_session(plain, "cuda")
    monkeypatch.setattr(session, "gpu_present", lambda: True)  # the driver can, the runtime cannot
    assert OnnxSystem(plain, "auto").provider == "CPUExecutionProvider"
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="no CUDA provider"):
        open_session(plain, "cuda")
    assert OnnxSystem(plain, "auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr().err == ""


# --- casemate.load ------------------------------------------------------------------------------------------


def test_predict_takes_every_usual_form_of_images(limited: Path) -> None:
    model = casemate.load(limited, "cpu")
    grey = (images(7).numpy() * 255).round().astype(np.uint8)
    reference = model.predict(grey)
    assert reference.logits.shape == reference.probabilities.shape == (7, 10)
    assert reference.names == tuple(ABOUT.classes[label] for label in reference.labels)
    assert reference.manifold_score is not None and reference.manifold_score.shape == (7,)
    np.testing.assert_allclose(reference.probabilities.sum(1), 1, rtol=1e-5)
    floats = grey.astype(np.float32) / 255
    for form in (
        grey.transpose(0, 2, 3, 1),
        grey[:, 0],
        floats,
        floats.astype(np.float64),
        floats.transpose(0, 2, 3, 1),
    ):
        np.testing.assert_allclose(model.predict(form).logits, reference.logits, rtol=1e-5, atol=1e-5)
    for one in (grey[3], grey[3, 0], grey[3].transpose(1, 2, 0)):
        assert model.predict(one).labels.tolist() == [reference.labels[3]]


def test_predict_on_a_foreign_file_has_numbers_for_names(tmp_path: Path) -> None:
    found = casemate.load(foreign(tmp_path / "f.onnx"), "cpu").predict(images(4).numpy())
    expected = images(4).flatten(1) @ torch.from_numpy(WEIGHTS)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, expected.softmax(1), rtol=1e-5, atol=1e-6)
    assert found.names == tuple(str(label) for label in expected.argmax(1).tolist())
    assert found.manifold_score is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), "takes images"), (np.zeros((8, 9), np.uint8), "takes images"),
        (np.zeros((2, 1, 8, 8), np.int64), "uint8 or float, not int64"),
        (np.full((2, 1, 8, 8), 255.0), "reach from 255 to 255"), (np.full((1, 8, 8), np.nan), "reach from nan"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(bad: np.ndarray, words: str, plain: Path) -> None:
    with pytest.raises(UserError, match=words):
        casemate.load(plain, "cpu").predict(bad)


def test_predict_from_several_threads(limited: Path) -> None:
    model, batches = casemate.load(limited, "cpu"), [images(n).numpy() for n in (1, 3, 8, 20) * 4]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: model.predict(batch).logits, batches))
    for batch, logits in zip(batches, found, strict=True):
        np.testing.assert_array_equal(logits, model.predict(batch).logits)


def test_importing_casemate_imports_no_runtime() -> None:
    code = "import casemate, sys; assert not {'torch', 'onnxruntime', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'save'"):
        casemate.save  # noqa: B018


def test_opening_a_file_leaves_nothing_under_home(plain: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry writes a device id and a queue of events there."""
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY" and not k.startswith("XDG_")}
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import os
from pathlib import Path
from casemate.deploy.session import open_session
open_session(Path({str(plain)!r}), "cpu")
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**kept, "HOME": str(home)})
    assert list(home.rglob("*")) == []


def test_the_users_own_word_on_telemetry_stands() -> None:
    code = "import casemate, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
