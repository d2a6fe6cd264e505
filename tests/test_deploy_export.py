"""Exported files: the numbers of PyTorch, standard operators only, nothing of this machine inside."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from casemate.deploy.export import ExportOptions, export_system
from casemate.deploy.metadata import Metadata
from casemate.deploy.onnx_system import OnnxSystem
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.purification.imt import IMT
from casemate.system import TorchSystem
from tests.deploy_toys import ABOUT, SHAPE, Block, imt_system, settled

OUTPUTS = ["logits", "probabilities", "manifold_score", "purified"]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports a system, each distinct request once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def make(rule: str = "full", steps: int = 1, form: str | None = None, **options: object) -> Path:
        key = (rule, steps, form, *sorted(options.items()))
        if key not in made:
            made[key] = folder / f"{len(made)}.onnx"
            settings = ExportOptions(**{"purified": True, **options})  # type: ignore[arg-type]
            export_system(imt_system(rule, steps=steps), made[key], ABOUT, form=form, options=settings)  # type: ignore[arg-type]
        return made[key]

    return make


def images(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or SHAPE), generator=torch.Generator().manual_seed(n))


def run(path: Path, x: Tensor) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in OnnxSystem(path, "cpu").run(x.numpy()).items()}


@pytest.mark.parametrize(("rule", "steps"), [("full", 1), ("interval", 2)])
def test_onnx_runtime_gives_pytorchs_numbers_for_any_batch(export: Make, rule: str, steps: int) -> None:
    system, path = imt_system(rule, steps=steps), export(rule, steps)
    imt = system.purification
    assert isinstance(imt, IMT)
    for n in (1, 5, 501):
        x = images(n)
        found = run(path, x)
        assert list(found) == OUTPUTS
        torch.testing.assert_close(found["manifold_score"], imt.score(x), rtol=0, atol=2e-5)
        same = (found["purified"] - imt(x)).abs() < 1e-6
        assert same.float().mean() > 0.999
        with torch.no_grad():
            logits = system.classifier(found["purified"])
        torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["probabilities"], logits.softmax(1), rtol=1e-5, atol=1e-5)


def test_the_limited_form_halves_some_moves_and_not_others(export: Make) -> None:
    x = 0.25 + images(200) / 2
    found = run(export(form="limited", conv="flip", pool="scatter", opset=20), x)
    moved = (found["purified"] - x).abs().flatten(1)
    half = (found["manifold_score"] > 0.3) & (found["manifold_score"] < 0.7)
    assert 20 < half.sum() < 180
    expected = torch.where(half, 0.05, 0.1)[:, None].expand_as(moved)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_ways_of_writing_the_gradient_and_opsets_agree(export: Make) -> None:
    x = 0.25 + images(40) / 2
    path = export(form="limited", conv="flip", pool="scatter", opset=20)
    found, reference = run(path, x), run(export(), x)
    torch.testing.assert_close(found["manifold_score"], reference["manifold_score"], rtol=0, atol=2e-5)
    same = (found["purified"] - x).sign() == (reference["purified"] - x).sign()
    assert same.float().mean() > 0.999
    assert onnx.load(path).opset_import[0].version == 20


def test_a_plain_file_from_a_purified_system_takes_uint8_images_with_channels_last(export: Make) -> None:
    levels = (images(9) * 255).round() / 255
    path = export(form="plain", layout="uint8-nhwc")
    found = run(path, levels)
    taken = OnnxSystem(path, "cpu").session.get_inputs()[0]
    assert (taken.type, taken.shape) == ("tensor(uint8)", ["batch", 8, 8, 1])
    assert list(found) == ["logits", "probabilities"]
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], imt_system().classifier(levels), rtol=1e-5, atol=1e-5)


def test_the_file_is_standard_self_contained_and_small(export: Make) -> None:
    model = onnx.load(export("interval", 2))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert model.opset_import[0].version >= 18
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    stored = [tensor.raw_data for tensor in model.graph.initializer if len(tensor.raw_data) > 256]
    assert len(stored) == len(set(stored))
    weights = sum(
        p.numel() for m in (imt_system().classifier, imt_system().purification.critic) for p in m.parameters()
    )  # type: ignore[union-attr]
    assert sum(map(len, stored)) <= 4 * weights + 24_000  # a small kernel may be there flipped, too


def test_equal_weights_give_an_equal_file_without_this_machine(export: Make, tmp_path: Path) -> None:
    again = tmp_path / "another name.onnx"
    export_system(imt_system(), again, ABOUT, options=ExportOptions(purified=True))
    content = again.read_bytes()
    assert content == export().read_bytes()
    for trace in (str(Path.cwd()), str(Path.home()), str(tmp_path), "site-packages", ".py", f"/{getpass.getuser()}/"):
        assert trace.encode() not in content
    model = onnx.load(again)
    assert not model.doc_string and not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_metadata_round_trip(export: Make) -> None:
    path = export("interval", 2)
    strings = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert list(strings) == sorted(strings)
    assert json.loads(strings["classes"]) == list("0123456789")
    assert json.loads(strings["band"]) == [0.3, 0.7]
    assert (strings["dataset"], strings["norm"], strings["radius"]) == ("digits", "linf", "0.1")
    assert (strings["input_layout"], strings["input_range"]) == ("float32-nchw", "[0, 1]")
    found = Metadata.read(strings, path)
    assert found is not None
    assert (found.about, found.form, found.input_shape) == (ABOUT, "limited", SHAPE)
    assert (found.purification["steps"], found.purification["step"]) == (2, 0.5)
    for key in ("schema", "classes", "form", "radius"):
        with pytest.raises(UserError, match="export it again"):
            Metadata.read({**strings, key: "casemate/0"}, path)
    assert Metadata.read({"classes": "[]"}, path) is None


def test_the_system_is_left_as_it_was(tmp_path: Path) -> None:
    system = imt_system()
    system.classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    system.classifier.train()
    before = system.hash()
    export_system(system, tmp_path / "a.onnx", ABOUT, form="plain")
    assert system.hash() == before
    assert system.classifier.training and all(p.requires_grad for p in system.classifier.parameters())


def test_a_resnet_with_batch_norm_and_the_published_critic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 16, 3, padding=1), "one": Block(16, 16, 1), "two": Block(16, 32, 2)}
    pooled: dict[str, nn.Module] = {**layers, "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}
    classifier = Classifier(input_shape=(3, 16, 16), num_classes=10, layers=pooled, head=nn.Linear(32, 10))
    settled(classifier, 3, 16)
    toy = imt_system(form="conv3x3").purification
    assert isinstance(toy, IMT)
    imt = IMT(classifier, toy.critic, radius=8 / 255)
    system = TorchSystem(classifier, input_shape=(3, 16, 16), num_classes=10, purification=imt)
    export_system(system, tmp_path / "a.onnx", ABOUT, options=ExportOptions(purified=True))
    x = images(20, 3, 16, 16)
    found = run(tmp_path / "a.onnx", x)
    torch.testing.assert_close(found["manifold_score"], imt.score(x), rtol=0, atol=2e-5)
    assert ((found["purified"] - imt(x)).abs() < 1e-6).float().mean() > 0.998
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], classifier(found["purified"]), rtol=1e-4, atol=1e-4)
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer)
    assert stored < 2 * sum(p.numel() for m in (classifier, toy.critic) for p in m.parameters())  # half: dead taps


class Cummax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).cummax(1)[0]


def test_bad_requests(tmp_path: Path) -> None:
    plain = TorchSystem(imt_system().classifier, input_shape=SHAPE, num_classes=10, name="plainly")
    with pytest.raises(UserError, match="plainly has no critic, so it has no form 'imt'"):
        export_system(plain, tmp_path / "a.onnx", ABOUT, form="imt")
    strange = nn.Sequential(Cummax(), nn.Linear(64, 10))
    with pytest.raises(UserError, match=r"aten\.cummax") as caught:
        export_system(TorchSystem(strange, input_shape=SHAPE, num_classes=10), tmp_path / "a.onnx", ABOUT)
    assert "\n" not in str(caught.value)
    plain.purification = Cummax()  # type: ignore[assignment]
    with pytest.raises(UserError, match="purification Cummax cannot be exported"):
        export_system(plain, tmp_path / "a.onnx", ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_constants_that_build_on_each_other_are_folded_once(tmp_path: Path) -> None:
    """Scaling computes indices from indices, and both are read by what depends on the image."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            large: Tensor = nn.functional.interpolate(x, (11, 11), mode="bilinear", align_corners=False)
            return large.flatten(1)

    net = nn.Sequential(Scaled(), nn.Linear(121, 10)).eval()
    export_system(TorchSystem(net, input_shape=SHAPE, num_classes=10), tmp_path / "a.onnx", ABOUT)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "a.onnx", x)["logits"], net(x), rtol=1e-5, atol=1e-5)
