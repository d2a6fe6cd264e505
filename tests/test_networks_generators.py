"""Generators: the authors' parameter counts, shapes, and what each of their parts is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.networks.generators import (
    ConditionalBatchNorm,
    PosteriorEncoder,
    ResidualGenerator,
    SlimAttacker,
    UNetGenerator,
    WideAttacker,
)


def test_parameters_are_those_of_the_authors_networks() -> None:
    assert count_parameters(ResidualGenerator(9, 6)) == 10_330_880
    assert count_parameters(ResidualGenerator(10, 3, z_dim=64, size=(32, 32))) == 10_606_080
    assert count_parameters(PosteriorEncoder(3, 64, (32, 32))) == 724_384
    assert count_parameters(WideAttacker(6, 3)) + 1 == 1_747_852  # theirs holds a scale that nothing reads
    assert count_parameters(SlimAttacker(6, 3)) == 1_434_359


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "side", "classes", "z_dim", "parameters"),
    [(3, 1, 28, 10, 8, 495_184), (9, 3, 32, 10, 8, 500_944), (9, 3, 64, 200, 8, 573_904), (6, 3, 32, 0, 0, 466_048)],
)
def test_parameters_of_the_u_net(
    channels_in: int, channels_out: int, side: int, classes: int, z_dim: int, parameters: int
) -> None:
    net = UNetGenerator(channels_in, channels_out, (channels_out, side, side), z_dim=z_dim, num_classes=classes)
    assert count_parameters(net) == parameters


@pytest.mark.parametrize("size", [(8, 8), (12, 16), (28, 28)])
def test_every_generator_gives_images_of_the_size_it_was_given(size: tuple[int, int]) -> None:
    x, z, y = torch.rand(3, 6, *size), torch.randn(3, 8), torch.tensor([0, 1, 2])
    u_net = UNetGenerator(6, 2, (2, *size), width=4, num_classes=3)
    assert u_net(x, y, z).shape == (3, 2, *size)
    assert ResidualGenerator(7, 2, width=4, z_dim=8, size=size)(x, z).shape == (3, 2, *size)
    for made in (WideAttacker, SlimAttacker):
        out = made(6, 2, width=8)(x)
        assert out.shape == (3, 2, *size) and out.abs().max() <= 1


def test_the_deeper_u_net_has_a_third_level() -> None:
    x, z, y = torch.rand(2, 3, 16, 16), torch.randn(2, 8), torch.tensor([0, 1])
    deep = UNetGenerator(3, 1, (1, 16, 16), width=4, num_classes=2, deeper=True)
    assert deep(x, y, z).shape == (2, 1, 16, 16)
    assert [step.norm is None for step in deep.down] == [True, False, False, True]
    with pytest.raises(UserError, match="multiples of 8"):
        UNetGenerator(3, 1, (1, 12, 12), deeper=True)


@pytest.mark.parametrize("side", [8, 19, 20, 28, 64])
def test_the_encoder_reads_images_of_any_size(side: int) -> None:
    mean, variance = PosteriorEncoder(1, 5, (side, side), width=2)(torch.randn(3, 1, side, side))
    assert mean.shape == variance.shape == (3, 5) and variance.min() > 0


def test_one_class_is_plain_batch_normalisation_with_the_sum_of_both_rows() -> None:
    torch.manual_seed(0)
    conditional, x = ConditionalBatchNorm(4, 1), torch.randn(5, 4, 3, 3)
    plain = nn.BatchNorm2d(4, eps=1e-10)
    assert conditional.class_scale is not None
    with torch.no_grad():
        conditional.shift.normal_()
        conditional.class_shift.normal_()
        plain.weight.copy_(conditional.scale + conditional.class_scale[0])
        plain.bias.copy_(conditional.shift + conditional.class_shift[0])
    y = torch.zeros(5, dtype=torch.long)
    assert torch.allclose(conditional(x, y), plain(x), atol=1e-6)
    assert torch.allclose(conditional.norm.running_var, plain.running_var)
    plain.eval()
    assert torch.allclose(conditional.eval()(x, y), plain(x), atol=1e-6)


def test_label_and_noise_reach_the_output() -> None:
    torch.manual_seed(0)
    net = UNetGenerator(3, 1, (1, 8, 8), width=8, num_classes=10).eval()
    x, z, y = torch.rand(1, 3, 8, 8), torch.randn(2, 8), torch.tensor([3, 4])
    with torch.no_grad():
        base = net(x, y[:1], z[:1])
        assert not torch.equal(net(x, y[1:], z[:1]), base) and not torch.equal(net(x, y[:1], z[1:]), base)
        assert torch.equal(net(x, y[:1], z[:1]), base)


def test_the_slim_attacker_reads_its_input_past_the_narrow_middle() -> None:
    """Its head joins the input to what the half-resolution path says, so a silent path still leaves an edge map."""
    slim = SlimAttacker(2, 1, width=8).eval()
    with torch.no_grad():
        slim.head.weight.zero_()
        slim.head.weight[0, -1, 1, 1] = 0.01  # the last input channel, as it is
        x = torch.rand(1, 2, 8, 8)
        assert torch.allclose(slim(x), torch.tanh(5 * 0.01 * x[:, 1:]))
