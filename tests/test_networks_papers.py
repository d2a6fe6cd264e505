"""The papers' further networks: parameter counts, the classifier contract, and what each does differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import CIFAR, MNIST
from test_networks import test_features_taps_and_splits_are_the_forward_pass as contract
from test_networks import test_the_input_gradient_can_be_traced_for_any_batch as traced
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.networks.base import build_network, count_parameters
from casemate.networks.madry_wrn import Standardise
from casemate.networks.singan import PATCH, PatchCritic, PatchGenerator, width_at
from casemate.registry import resolve

STL, TINY = (3, 96, 96), (3, 64, 64)


def stage(width_in: int, width: int, units: int) -> int:
    """Parameters of a stage of MadryWRN."""
    first = 2 * width_in + 9 * width_in * width + 2 * width + 9 * width * width
    return first + (units - 1) * (4 * width + 18 * width * width)


COUNTS = [
    ("madry_cnn", MNIST, 10, {}, 3_274_634),
    ("fast_cnn", MNIST, 10, {}, 166_406),
    ("vgg16_bn", CIFAR, 10, {}, 14_728_266),
    # torchvision's 11,689,512 with 1,000 classes and a 7x7 stem
    ("resnet18", TINY, 200, {}, 11_689_512 - 3 * 64 * (49 - 9) - 513 * (1000 - 200)),
    ("stl10_cnn", STL, 10, {}, 896 + 18_496 + 73_856 + 295_168 + 590_080 + 1_180_160 + 2 * 1_248 + 5_130),
    ("madry_wrn", CIFAR, 10, {}, 432 + stage(16, 160, 5) + stage(160, 320, 5) + stage(320, 640, 5) + 1_280 + 6_410),
]


@pytest.mark.parametrize(("name", "shape", "classes", "options", "count"), COUNTS)
def test_parameter_counts(name: str, shape: Any, classes: int, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        made = build_network(name, input_shape=shape, num_classes=classes, **options)
    assert count_parameters(made) == count
    assert f"{count:,} parameters" in " ".join(resolve("network", name).__doc__.split())


@pytest.mark.parametrize(("depth", "with_dead_stage"), [(28, 38_119_866), (34, 48_262_586)])
def test_public_copies_of_the_wide_network_carry_its_first_stage_twice(depth: int, with_dead_stage: int) -> None:
    """TRADES, ADT and L2L: a second first stage that nothing reads. Ours has none."""
    with torch.device("meta"):
        wrn = build_network("wrn", input_shape=CIFAR, num_classes=10, depth=depth)
    assert count_parameters(wrn) + count_parameters(wrn.body["stage1"]) == with_dead_stage


SMALL = [
    ("madry_cnn", MNIST, {}, 1024),
    ("fast_cnn", MNIST, {}, 100),
    ("vgg16_bn", CIFAR, {}, 512),
    ("resnet18", (3, 16, 16), {}, 512),
    ("stl10_cnn", STL, {}, 512),
    ("madry_wrn", (3, 16, 16), {"units": 2, "width": 1}, 64),
]


@pytest.mark.parametrize(("name", "shape", "options", "width"), SMALL)
def test_they_keep_the_classifier_contract(name: str, shape: Any, options: dict[str, Any], width: int) -> None:
    contract(name, shape, options, width)


@pytest.mark.parametrize(
    ("name", "shape", "options"), [("madry_wrn", (1, 8, 8), {"units": 1, "width": 1}), ("resnet18", (1, 8, 8), {})]
)
def test_their_input_gradient_can_be_traced(name: str, shape: Any, options: dict[str, Any]) -> None:
    traced(name, shape, options)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("madry_cnn", CIFAR, "madry_cnn takes 1x28x28 images"),
        ("fast_cnn", CIFAR, "fast_cnn takes 1x28x28 images"),
        ("vgg16_bn", (3, 48, 48), "multiples of 32"),
        ("resnet18", (3, 12, 12), "multiples of 8"),
        ("stl10_cnn", TINY, "stl10_cnn takes 3x96x96 images"),
        ("madry_wrn", (3, 30, 32), "multiples of 4"),
    ],
)
def test_a_wrong_shape_is_refused(name: str, shape: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_network(name, input_shape=shape, num_classes=10)


def test_madrys_mnist_network_begins_as_published() -> None:
    torch.manual_seed(0)
    net = build_network("madry_cnn", input_shape=MNIST, num_classes=10)
    weight = net.body["fc1"][0].weight  # type: ignore[index]
    assert weight.abs().max() <= 0.2 and 0.085 < weight.std() < 0.091  # 0.088 after the cut at two deviations
    assert all((p == 0.1).all() for name, p in net.named_parameters() if name.endswith("bias"))


# --- MadryLab's wide network ------------------------------------------------------------------------------------


def test_standardisation_is_tensorflows() -> None:
    """(x - mean) / max(std, 1 / sqrt(n)) of an image in [0, 255]."""
    x = torch.rand(3, 3, 5, 4, dtype=torch.float64)
    x[2] = 0.4 + 1e-6 * torch.rand(3, 5, 4)  # flatter than the floor
    large = 255 * x
    deviation = large.flatten(1).std(1, correction=0).clamp_min(60**-0.5).view(-1, 1, 1, 1)
    expected = (large - large.mean((1, 2, 3), keepdim=True)) / deviation
    torch.testing.assert_close(Standardise()(x), expected)
    flat = torch.full((1, 3, 5, 4), 0.4, requires_grad=True)
    Standardise()(flat).square().sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_madrys_units_pool_and_pad_their_shortcut() -> None:
    torch.manual_seed(0)
    net = build_network("madry_wrn", input_shape=CIFAR, num_classes=10, units=2, width=2).eval()
    first, kept, reduced = net.body["stage1"][0], net.body["stage1"][1], net.body["stage2"][0]  # type: ignore[index]
    with torch.no_grad():
        for unit in (first, kept, reduced):
            unit.conv2.weight.zero_()
    x = torch.randn(2, 16, 8, 8)
    activated = F.leaky_relu(first.norm1(x), 0.1)
    assert torch.equal(first(x)[:, 8:24], activated) and not first(x)[:, :8].any() and not first(x)[:, 24:].any()
    wide = torch.randn(2, 32, 8, 8)
    assert torch.equal(kept(wide), wide)
    out = reduced(wide)
    assert out.shape == (2, 64, 4, 4) and torch.equal(out[:, 16:48], F.avg_pool2d(wide, 2))


# --- SinGAN -----------------------------------------------------------------------------------------------------


def test_the_singan_pair_has_the_published_counts() -> None:
    assert count_parameters(PatchGenerator(3)) == 29_763
    assert count_parameters(PatchCritic(3)) == 29_185
    assert [width_at(scale) for scale in (0, 3, 4, 7, 8, 12)] == [32, 32, 64, 64, 128, 128]


def test_a_critic_compares_patches_of_eleven_pixels() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(3).eval()
    x = torch.rand(1, 3, 16, 20, requires_grad=True)
    scores = critic(x)
    assert scores.shape == (1, 1, 6, 10)
    scores[0, 0, 2, 3].backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero()
    assert seen.amin(0).tolist() == [2, 3] and seen.amax(0).tolist() == [12, 13] and PATCH == 11
    with pytest.raises(UserError, match="11x11 or more, not 10x20"):
        critic(torch.rand(1, 3, 10, 20))


def test_a_generator_writes_a_bounded_residual() -> None:
    torch.manual_seed(0)
    generator = PatchGenerator(1, width=8).eval()
    previous, noise = torch.rand(2, 1, 9, 7), torch.randn(2, 1, 9, 7)
    out: Tensor = generator(previous + noise, previous)
    assert out.shape == previous.shape and (out - previous).abs().max() <= 1
    padded = F.pad(previous + noise, (5, 5, 5, 5))
    published = torch.tanh(generator.body(padded)) + F.pad(previous, (5, 5, 5, 5))[:, :, 5:-5, 5:-5]
    torch.testing.assert_close(out, published)
    last = generator.body[-1]
    assert isinstance(last, nn.Conv2d) and last.weight.std() < 0.03
