"""The pyramid of SinGAN pairs: sizes, what each scale is given, what a critic's batch norms couple."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.networks.patch_pyramid import PyramidCritic, PyramidGenerator, pyramid_sizes, resized


def sides(side: int, scales: int | None = None, **options: int) -> list[int]:
    return [height for height, _ in pyramid_sizes(side, side, scales, **options)]


def test_sizes() -> None:
    assert sides(32) == [25, 29, 32] and sides(28) == [25, 27, 28]
    assert sides(32, coarsest=12) == [12, 15, 18, 22, 27, 32]
    assert sides(224) == [25, 32, 41, 52, 67, 85, 108, 138, 176, 224], "the published rule"
    assert len(sides(250)) == 11 and len(sides(299)) == 10 and sides(299)[-1] == 250, "as the published code counts"
    assert pyramid_sizes(300, 200)[-1] == (250, 167) and pyramid_sizes(300, 200)[0] == (38, 25)
    assert sides(128, 5) == [25, 38, 57, 86, 128] and sides(64, 3) == [25, 40, 64]
    assert sides(16, coarsest=8, patch=5) == [8, 10, 12, 14, 16], "smaller patches"
    assert sides(64, 1) == [64] and sides(64, 2) == [25, 64] and sides(64, 2, coarsest=16, largest=32) == [16, 32]
    assert sides(24) == [24], "no larger than the coarsest scale"
    assert pyramid_sizes(50, 100, 2) == [(25, 50), (50, 100)]
    for side, options in ((10, {}), (32, {"coarsest": 8}), (224, {"largest": 5})):
        with pytest.raises(UserError, match="patches are 11x11"):
            pyramid_sizes(side, side, **options)


def test_resizing_is_smooth_downward_and_bilinear_upward() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[..., ::2] = 1.0
    assert (resized(x, (8, 8)) - 0.5)[..., 1:-1].abs().max() < 0.1, "stripes finer than the pixels become grey"
    assert resized(x, (16, 16)) is x
    up = resized(x, (20, 20))
    torch.testing.assert_close(up, F.interpolate(x, (20, 20), mode="bilinear"))


def test_every_scale_adds_to_what_the_coarser_ones_made() -> None:
    torch.manual_seed(0)
    g = PyramidGenerator(3, [(12, 12), (16, 20)], width=4).eval()
    x = torch.rand(2, 3, 16, 20)
    real = g.pyramid(x)
    noise = [torch.randn_like(part) for part in real]
    assert [tuple(part.shape[2:]) for part in real] == [(12, 12), (16, 20)] and real[1] is x
    with torch.no_grad():
        made = g(real, noise)
        first = g.scales[0](real[0] + noise[0], real[0])
        second = g.scales[1](x + noise[1], resized(first, (16, 20)))
    assert torch.equal(made[0], first) and torch.equal(made[1], second)


def test_widths_double_every_four_scales() -> None:
    sizes = pyramid_sizes(224, 224)
    counts = [count_parameters(scale) for scale in PyramidGenerator(3, sizes).scales]
    assert counts[:4] == [29_763] * 4 and counts[4] == counts[7] > counts[3] and counts[8] == counts[9] > counts[7]
    critics = [count_parameters(scale) for scale in PyramidCritic(3, 10).scales]
    assert critics[:4] == [29_185] * 4


def test_a_score_depends_on_other_images_through_batch_norm_alone() -> None:
    for norm, coupled in (("batch", True), ("none", False)):
        torch.manual_seed(0)
        f = PyramidCritic(1, 2, width=4, norm=norm).train()  # type: ignore[arg-type]
        a, b, c = torch.rand(3, 1, 1, 14, 14)
        with_b, with_c = (f([torch.cat([a, other]), torch.cat([a, other])]) for other in (b, c))
        for one, other in zip(with_b, with_c, strict=True):
            assert one.shape == (2, 1, 4, 4)
            assert torch.allclose(one[0], other[0], atol=1e-6) != coupled
