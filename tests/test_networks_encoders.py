"""Encoders, critic and image GAN: published parameter counts, the classifier contract, input ranges, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network, count_parameters
from casemate.networks.encoders import CodeCritic, encoder_parameters
from casemate.networks.gan import ImageCritic, ImageGenerator

MNIST, CIFAR, STL, TINY = (1, 28, 28), (3, 32, 32), (3, 96, 96), (3, 64, 64)
NORMS_19 = 2 * (2 * 64 + 2 * 128 + 4 * 256 + 4 * 512 + 4 * 512)
CONVS_16 = 14_714_688  # weights and biases of VGG16's convolutions
COUNTS = [  # (network, shape, options, encoder, head): DEFENSES 1.6; the others by hand
    ("er_conv", MNIST, {}, 11_019_780, 134_838),
    ("er_conv", STL, {"code": 16, "closing": "whole"}, 82_363_920, 140_838),
    ("er_vgg", CIFAR, {"batch_norm": False}, 20_032_592, 539_146),
    ("er_vgg", CIFAR, {}, 20_032_592 + NORMS_19, 539_146),
    ("er_vgg", CIFAR, {"depth": 16}, CONVS_16 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512) + 8_208, 539_146),
]


@pytest.mark.parametrize(("name", "shape", "options", "encoder", "head"), COUNTS)
def test_parameter_counts(name: str, shape: Any, options: dict[str, Any], encoder: int, head: int) -> None:
    with torch.device("meta"):
        made = build_network(name, input_shape=shape, num_classes=10, normalise=Normalise([0.0], [1.0]), **options)
    own = encoder_parameters(made)
    assert sum(p.numel() for p in own) == encoder
    assert count_parameters(made.head) == head
    assert count_parameters(made) == encoder + head
    assert not {id(p) for p in own} & {id(p) for p in made.head.parameters()}


@pytest.mark.parametrize(("code", "count"), [(4, 791_041), (16, 797_185)])
def test_the_critic_has_the_published_count(code: int, count: int) -> None:
    assert count_parameters(CodeCritic(code)) == count


def test_the_gan_has_the_published_counts() -> None:
    assert count_parameters(ImageGenerator(MNIST)) == 1_554_177
    assert count_parameters(ImageCritic(MNIST)) == 1_030_145


SMALL = [
    ("er_conv", MNIST, {"dim": 2}, ["conv1", "conv2", "conv3", "conv4", "pool", "code"], 4),
    ("er_conv", (1, 8, 8), {"dim": 2, "code": 3, "hidden": (5, 6)}, ["conv1", "conv2", "conv3", "pool", "code"], 3),
    ("er_conv", STL, {"dim": 1, "closing": "whole"}, [f"conv{i}" for i in range(1, 7)] + ["pool", "code"], 4),
    ("er_conv", TINY, {"dim": 1, "closing": "whole"}, [f"conv{i}" for i in range(1, 7)] + ["pool", "code"], 4),
    ("er_vgg", CIFAR, {"width": 2}, [f"stage{i}" for i in range(1, 6)] + ["pool", "code"], 16),
    ("er_vgg", (1, 16, 16), {"width": 2, "depth": 16}, [f"stage{i}" for i in range(1, 6)] + ["pool", "code"], 16),
]


@pytest.mark.parametrize(("name", "shape", "options", "layers", "width"), SMALL)
def test_the_classifier_contract(
    name: str, shape: Any, options: dict[str, Any], layers: list[str], width: int
) -> None:
    torch.manual_seed(0)
    f = build_network(name, input_shape=shape, num_classes=7, **options).eval()
    x = torch.rand(2, *shape)
    assert f.layers == layers
    with torch.no_grad():
        codes, logits = f.features(x), f(x)
        assert codes.shape == (2, width) and logits.shape == (2, 7)
        assert torch.equal(f.head(codes), logits) and logits.std() > 0
        seen = f.taps(x, [*f.layers, "head"])
        assert torch.equal(seen["code"], codes) and torch.equal(seen["head"], logits)
        for layer in f.layers:
            lower, upper = f.split(layer)
            assert torch.equal(upper(lower(x)), logits)
        # A batch of one is an image like any other.
        torch.testing.assert_close(f(x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


def test_the_last_maps_of_the_convolutional_encoder_are_one_pixel() -> None:
    """28-14-7-3-1 and 96-48-24-12-6-3-1, with BatchNorm from the second convolution on."""
    for shape, options, sizes in [
        (MNIST, {}, [14, 7, 3, 1]),
        (STL, {"closing": "whole"}, [48, 24, 12, 6, 3, 1]),
        (TINY, {"closing": "whole"}, [32, 16, 8, 4, 2, 1]),
    ]:
        f = build_network("er_conv", input_shape=shape, num_classes=10, dim=1, **options).eval()  # type: ignore[arg-type]
        seen = f.taps(torch.rand(1, *shape), f.layers)
        assert [tuple(seen[f"conv{i + 1}"].shape[2:]) for i in range(len(sizes))] == [(s, s) for s in sizes]
        normed = [any(isinstance(m, nn.BatchNorm2d) for m in f.body[f"conv{i + 1}"]) for i in range(len(sizes))]  # type: ignore[union-attr]
        assert normed == [False] + [True] * (len(sizes) - 1)


def test_input_ranges_are_the_authors_unless_the_profile_has_its_own() -> None:
    conv = build_network("er_conv", input_shape=MNIST, num_classes=10, dim=1)
    assert conv.normalise(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).flatten().tolist() == [-1, 1]
    vgg = build_network("er_vgg", input_shape=CIFAR, num_classes=10, width=1)
    torch.testing.assert_close(
        vgg.normalise(torch.zeros(1, 3, 1, 1)).flatten(), -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225])
    )
    own = Normalise([0.1], [0.2])
    assert build_network("er_conv", input_shape=MNIST, num_classes=10, dim=1, normalise=own).normalise is own


def test_the_critics_outputs() -> None:
    torch.manual_seed(0)
    linear = CodeCritic(3, width=5, output="linear")
    logsigmoid = CodeCritic(3, width=5)
    logsigmoid.load_state_dict(linear.state_dict())
    z = torch.randn(6, 3)
    assert linear(z).shape == (6,)
    torch.testing.assert_close(logsigmoid(z), linear(z).sigmoid().log())


@pytest.mark.parametrize("shape", [MNIST, CIFAR, (1, 8, 8)])
def test_the_generator_makes_images(shape: Any) -> None:
    images = ImageGenerator(shape, latent=3, width=2)(torch.randn(5, 3)).detach()
    assert images.shape == (5, *shape) and float(images.min()) > 0 and float(images.max()) < 1
    assert ImageCritic(shape, width=2)(images).shape == (5,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_network("er_conv", input_shape=(1, 28, 24), num_classes=2), "er_conv takes square images"),
        (lambda: build_network("er_vgg", input_shape=MNIST, num_classes=2), "multiples of 16, not 1x28x28"),
        (lambda: ImageGenerator((3, 64, 64)), "not 64x64"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
