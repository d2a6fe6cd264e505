"""Inception-v3 and ResNet-101: counts, the contract, torchvision's numbers, and the weights they may begin with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as published
from safetensors.torch import save_file
from test_networks import test_features_taps_and_splits_are_the_forward_pass as contract
from torch import nn

from casemate.errors import UserError
from casemate.networks import pretrained
from casemate.networks.base import Classifier, Normalise, build_network, count_parameters
from casemate.networks.encoders import ERVGG
from casemate.networks.resnet101 import ResNet101
from casemate.registry import resolve

FULL = {"resnet101": (3, 224, 224), "inception_v3": (3, 299, 299)}
SMALL = {"resnet101": (3, 32, 32), "inception_v3": (3, 75, 75)}
COUNTS = {"resnet101": 44_549_160, "inception_v3": 23_834_568}


def built(name: str, classes: int = 10, shape: Any = None, **options: Any) -> Classifier:
    torch.manual_seed(0)
    shape = shape or SMALL[name]
    return build_network(
        name, input_shape=shape, num_classes=classes, normalise=Normalise([0.3] * 3, [0.2] * 3), **options
    ).eval()


class Tiny(nn.Module):
    """What `begin` fills: anything whose head is `fc`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)


@pytest.fixture
def published_tiny(tmp_path: Path) -> tuple[Tiny, Path]:
    """A network with 12 classes, and its weights in a file as training scripts leave them."""
    made, path = Tiny(12), tmp_path / "tiny.pth"
    aux = {"module.AuxLogits.fc.weight": torch.zeros(2)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()} | aux, "epoch": 3}, path)
    return made, path


def begun(classes: int, **options: Any) -> tuple[Tiny, Normalise | None]:
    made = Tiny(classes)
    with torch.no_grad():
        made.conv.weight.zero_()
    return made, ResNet101(**options).begin(made, classes, Normalise([0.3] * 3, [0.2] * 3))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", FULL)
def test_parameter_counts_and_shapes(name: str) -> None:
    with torch.device("meta"):
        net = build_network(name, input_shape=FULL[name], num_classes=1000)
        seen = net.eval().taps(torch.empty(1, *FULL[name]), net.layers)
    assert (
        count_parameters(net) == COUNTS[name] and f"{COUNTS[name]:,} parameters" in resolve("network", name).__doc__
    )
    last = seen[net.layers[-2]]
    assert last.shape == (1, 2048, *{"resnet101": (7, 7), "inception_v3": (8, 8)}[name]) and net.layers[-1] == "pool"


@pytest.mark.parametrize("name", SMALL)
def test_they_keep_the_classifier_contract(name: str) -> None:
    contract(name, SMALL[name], {}, 2048)


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet101", (3, 31, 64)), ("resnet101", (1, 64, 64)), ("inception_v3", (3, 74, 90))]
)
def test_a_wrong_shape_is_refused(name: str, shape: Any) -> None:
    with pytest.raises(UserError, match=f"{name} takes 3 x H x W images"):
        build_network(name, input_shape=shape, num_classes=10)


def test_smaller_images_may_be_scaled_up_first() -> None:
    net = built("inception_v3", shape=(3, 40, 40), side=80)
    x = torch.rand(1, 3, 40, 40)
    large = nn.functional.interpolate((x - 0.3) / 0.2, (80, 80), mode="bilinear", align_corners=False)
    stem = net.body["stem"]
    assert isinstance(stem, nn.Sequential)
    with torch.no_grad():
        assert torch.allclose(net.taps(x, ["stem"])["stem"], stem[1:](large), atol=1e-5)


def test_inception_is_torchvisions_network() -> None:
    torch.manual_seed(0)
    theirs = published.inception_v3(num_classes=10, aux_logits=False, init_weights=True).eval()
    net, x = built("inception_v3"), torch.rand(2, 3, 75, 75)
    with torch.no_grad():
        torch.testing.assert_close(net(x), theirs((x - 0.3) / 0.2), rtol=1e-4, atol=1e-5)
    dropped = built("inception_v3", dropout=1.0).train()
    assert not dropped.features(x).any()


def test_weights_and_their_normaliser(published_tiny: tuple[Tiny, Path]) -> None:
    theirs, path = published_tiny
    given = {"weights": str(path), "sha256": sha256(path)}
    net, normalise = begun(12, **given)
    assert torch.equal(net.conv.weight, theirs.conv.weight) and torch.equal(net.fc.weight, theirs.fc.weight)
    assert normalise is not None and normalise.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    chosen, _ = begun(3, **given, rows=(11, 0, 4))
    assert torch.equal(chosen.fc.weight, theirs.fc.weight[[11, 0, 4]])
    assert torch.equal(chosen.fc.bias, theirs.fc.bias[[11, 0, 4]])
    fresh, _ = begun(5, **given)
    assert torch.equal(fresh.conv.weight, theirs.conv.weight) and torch.equal(fresh.fc.weight, Tiny(5).fc.weight)
    tensors, flat = (
        {key: value.clone() for key, value in theirs.state_dict().items()},
        path.with_suffix(".safetensors"),
    )
    save_file(tensors, flat)
    assert torch.equal(begun(12, weights=str(flat), sha256=sha256(flat))[0].fc.weight, theirs.fc.weight)
    random, kept = begun(12)
    assert not random.conv.weight.any() and kept is not None and float(kept.mean[0, 0]) == pytest.approx(0.3)


def test_resnet_is_torchvisions_network(tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs, path = published.resnet101(num_classes=12).eval(), tmp_path / "resnet.pth"
    torch.save(theirs.state_dict(), path)
    net, x = built("resnet101", 12, weights=str(path), sha256=sha256(path)), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(net(x), theirs((x - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "normed"), [(16, True), (19, False)])
def test_the_encoder_of_er_may_begin_with_the_convolutions_of_a_vgg(
    depth: Any, normed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"vgg{depth}" + "_bn" * normed
    url = published.get_model_weights(name).IMAGENET1K_V1.url  # type: ignore[attr-defined]
    assert ERVGG(depth=depth, batch_norm=normed).published() == url
    torch.manual_seed(3)
    theirs, path = published.get_model(name).features.eval(), tmp_path / "vgg.pth"
    torch.save(
        {f"features.{k}": v for k, v in theirs.state_dict().items()} | {"classifier.0.bias": torch.ones(2)}, path
    )
    given = {"depth": depth, "batch_norm": normed, "weights": str(path), "sha256": sha256(path)}
    net, x = built("er_vgg", shape=(3, 32, 32), **given), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        found = net.taps(x, ["pool"])["pool"]
        torch.testing.assert_close(found, theirs((x - mean) / std).flatten(1), rtol=1e-4, atol=1e-5)
    for odd, said in (
        ({"width": 8}, "another network .tensor features.0.weight"),
        ({"depth": 35 - depth}, "another"),
    ):
        with pytest.raises(UserError, match=said):
            built("er_vgg", shape=(3, 32, 32), **{**given, **odd})
    with pytest.raises(UserError, match="say something of weights, and there are none"):
        built("er_vgg", shape=(3, 32, 32), sha256="0" * 64)


def test_official_weights_are_taken_from_the_folder_or_fetched(
    published_tiny: tuple[Tiny, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, path = published_tiny
    there = path.rename(path.with_name(f"tiny-{sha256(path)[:8]}.pth"))
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(ResNet101, "url", there.as_uri())
    for _ in range(2):
        assert torch.equal(begun(12, weights="official")[0].fc.weight, theirs.fc.weight)
        there.unlink(missing_ok=True)  # the second time it is not to be had, and not needed
    (tmp_path / "weights" / there.name).write_bytes(b"half")
    with pytest.raises(UserError, match="it is another file, or damaged"):
        begun(12, weights="official")
    (tmp_path / "weights" / there.name).unlink()
    with pytest.raises(UserError, match=r"could not be had .*leave weights out"):
        begun(12, weights="official")


def test_bad_weights_are_one_line(published_tiny: tuple[Tiny, Path], tmp_path: Path) -> None:
    _, path = published_tiny
    small, evil = tmp_path / "a.safetensors", tmp_path / "b.pth"
    save_file({"module.fc.weight": torch.zeros(2, 3)}, small)
    torch.save({"weights": print}, evil)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": str(path)}, "need its sha256"),
        ({"weights": str(path), "sha256": "0" * 64}, "it is another file"),
        ({"weights": str(tmp_path / "none.pth"), "sha256": "0" * 64}, "does not exist"),
        ({"weights": str(small), "sha256": sha256(small)}, "of another network"),
        ({"weights": str(evil), "sha256": sha256(evil)}, "holds no weights"),
        ({"weights": str(path), "sha256": sha256(path), "rows": (0, 1)}, "must name 12 of the 12 rows"),
        ({"weights": str(path), "sha256": sha256(path), "rows": tuple(range(1, 13))}, "must name 12 of the 12 rows"),
        ({"rows": tuple(range(12))}, "there are none"),
    ]
    for options, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            begun(12, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="set normalise to true"):
        ResNet101(weights=str(path), sha256=sha256(path)).begin(Tiny(12), 12, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("resnet101", 64), ("inception_v3", 75)])
def test_they_export_to_onnx(name: str, side: int, tmp_path: Path) -> None:
    from casemate.deploy.export import export_system
    from casemate.deploy.metadata import About
    from casemate.deploy.onnx_system import OnnxSystem
    from casemate.system import TorchSystem
    from tests.deploy_toys import settled

    shape, options = (3, side, side), {"side": 80} if name == "inception_v3" else {}
    net = built(name, shape=shape, **options)
    settled(net, 3, side)
    system = TorchSystem(net, input_shape=shape, num_classes=10)
    about = About("imagenet10", tuple("0123456789"), "linf", 0.0157, "standard", "row", "1.2.3")
    export_system(system, tmp_path / "a.onnx", about)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    found = torch.from_numpy(OnnxSystem(tmp_path / "a.onnx", "cpu").run(x.numpy())["logits"])
    with torch.no_grad():
        torch.testing.assert_close(found, net.eval()(x), rtol=1e-3, atol=1e-3)
