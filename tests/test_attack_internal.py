"""The internal distance, its budget, the pyramid and the critic's losses, against values worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import linear_system
from PIL import Image
from torch import Tensor, nn

from casemate.attacks.base import Cost
from casemate.attacks.internal import IWDBudget, apart, grid_stride, nearest_success
from casemate.attacks.pyramid import Pictures, critic_loss, picture_rngs, side_scores
from casemate.networks.patch_pyramid import resized
from casemate.networks.singan import PatchCritic, PatchGenerator, gradient_penalty
from casemate.reporting.strip import write_strip
from casemate.threat import untargeted


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def price(budget: IWDBudget, x_adv: Tensor, x: Tensor, offsets: Tensor) -> float:
    return budget._price(x_adv[0].numpy(), x[0].numpy(), offsets[0].numpy())


# --- the distance and its budget ------------------------------------------------------------------------------------


def test_the_coupling_is_the_best_of_all_permutations() -> None:
    x, x_adv, budget = images(1, 2, 4, 5), images(1, 2, 4, 5, seed=1), IWDBudget(1e-9, window=3)
    found = budget.coupling(x_adv, x)
    places = [(row, column) for row in range(2) for column in range(3)]
    one, other = ([part[0, :, r : r + 3, c : c + 3] for r, c in places] for part in (x, x_adv))
    least = min(
        sum(float((one[i] - other[j]).abs().mean()) for i, j in enumerate(order)) / 6
        for order in itertools.permutations(range(6))
    )
    assert price(budget, x_adv, x, found) == pytest.approx(least, abs=1e-6)
    assert least < price(budget, x_adv, x, torch.zeros_like(found))


def test_a_brighter_image_is_just_as_far_as_it_is_brighter() -> None:
    x = images(2, 3, 12, 12) * 0.8
    assert IWDBudget(0.1, 7).contains(x + 0.1, x).all() and not IWDBudget(0.099, 7).contains(x + 0.1, x).any()
    assert not IWDBudget(0.1, 7).coupling(x + 0.1, x).any()  # pairs of the same place suffice


def test_a_ball_of_linf_lies_in_the_ball_of_the_same_radius() -> None:
    x = images(3, 1, 16, 16)
    x_adv = (x + 0.05 * torch.sign(images(3, 1, 16, 16, seed=1) - 0.5)).clamp(0, 1)
    assert IWDBudget(0.05).contains(x_adv, x).all()


def test_a_witness_is_checked_and_not_believed() -> None:
    x = images(1, 1, 14, 14)
    x_adv = x.roll(1, dims=3)  # most patches are still there, elsewhere
    paid = IWDBudget(1e-9, 5)
    coupling = paid.coupling(x_adv, x)
    enough = IWDBudget(price(paid, x_adv, x, coupling) + 1e-5, 5)
    assert enough.contains(x_adv, x, coupling).all() and enough.contains(x_adv, x).all()
    assert not enough.contains(x_adv, x, torch.zeros_like(coupling)).any()
    assert not paid.contains(x_adv, x, coupling).any()
    cheat = coupling.clone()
    cheat[0, 1] = cheat[0, 0] - 1  # a patch that is used twice
    assert not IWDBudget(1.0, 5).contains(x_adv, x, cheat).any()
    for bad in (x_adv + 0.5, x_adv * torch.nan):
        assert not IWDBudget(1.0, 5).contains(bad, x).any() and not IWDBudget(None, 5).contains(bad, x).any()


def test_budgets_say_what_they_are() -> None:
    assert str(IWDBudget(None)) == "IWD, no limit, 11x11 patches"
    assert str(IWDBudget(0.02, 7)) == "IWD 0.02, 7x7 patches"
    assert (IWDBudget(0.02).norm, IWDBudget(0.02).radius, IWDBudget(None).radius) == ("iwd", 0.02, None)


def test_large_images_are_measured_on_a_grid() -> None:
    assert [grid_stride(shape, window) for shape, window in (((28, 28), 5), ((128, 128), 11), ((224, 224), 11))] == [
        1, 4, 7,
    ]  # fmt: skip
    x = images(1, 1, 80, 80)
    assert IWDBudget(0.1).coupling((x + 0.5).clamp(0, 1), x).shape == (1, 24 * 24)


def test_what_is_outside_is_brought_back_to_the_border() -> None:
    x = images(2, 1, 12, 12) * 0.5
    x_adv = torch.stack([x[0] + 0.3, x[1] + 0.02])
    back = IWDBudget(0.1, 5).drawn_back(x_adv, x)
    assert torch.equal(back[1], x_adv[1])
    assert 0.1 - 0.3 / 128 <= float((back[0] - x[0]).mean()) <= 0.1 + 1e-6


def test_candidates_are_compared_along_the_same_directions_every_time() -> None:
    x = images(2, 1, 16, 16)
    assert apart(x, x, 5).tolist() == [0, 0] and torch.equal(apart(x * 0.5, x, 5), apart(x * 0.5, x, 5))
    assert (apart(x * 0.5, x, 5) > apart(x * 0.9, x, 5)).all()


def test_of_several_candidates_the_nearest_success_is_kept() -> None:
    net = linear_system(torch.stack([torch.zeros(16), torch.ones(16) / 16]), torch.tensor([0.5, 0.0]), (1, 4, 4))
    view, x = net.views()["adaptive"], torch.full((2, 1, 4, 4), 0.5)  # the brightness decides: above 0.5 is class 1
    goal, budget = untargeted(torch.tensor([0, 1])), IWDBudget(None, 3)
    candidates, cost = [(x + step).clamp(0, 1) for step in (0.3, 0.1, -0.2, 0.4)], Cost.zero(2)
    kept = nearest_success(view, x, goal, candidates, budget, cost)
    assert torch.equal(kept, torch.stack([candidates[1][0], candidates[2][1]])) and cost.queries.tolist() == [4, 4]
    nothing = nearest_success(view, x, goal, [x - 0.2, x - 0.1, x], budget, cost)
    assert torch.equal(nothing[0], x[0])  # all fail there: the highest margin
    blind = replace(view, exact=False)
    kept = nearest_success(blind, x, goal, candidates, budget, cost)
    assert torch.equal(kept, torch.stack([candidates[3][0], candidates[2][1]]))
    held = nearest_success(view, x, goal, [x + 0.3], IWDBudget(0.1, 3), cost)
    assert float(held[0].mean()) == pytest.approx(0.6, abs=0.3 / 128)


# --- the pyramid ----------------------------------------------------------------------------------------------------


def test_networks_side_by_side_are_those_networks() -> None:
    torch.manual_seed(0)
    singles = [PatchGenerator(2, width=4) for _ in range(3)]
    together = PatchGenerator(2, width=4, copies=3)
    state = {
        k: torch.cat([s.state_dict()[k] for s in singles]) for k, v in singles[0].state_dict().items() if v.dim()
    }
    together.load_state_dict(state, strict=False)
    x, z = images(3, 2, 13, 12), images(3, 2, 13, 12, seed=1)
    expected = torch.cat([s(z[i : i + 1], x[i : i + 1]) for i, s in enumerate(singles)])
    found = together(z.reshape(1, 6, 13, 12), x.reshape(1, 6, 13, 12)).reshape(3, 2, 13, 12)
    assert torch.allclose(found, expected, atol=1e-5)
    bare = PatchCritic(2, width=4, norm=False, copies=3)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in bare.modules())
    scores = side_scores(bare)
    leaf = x.clone().requires_grad_()
    assert scores(leaf).shape == (3, 1, 3, 2)
    (slope,) = torch.autograd.grad(scores(leaf)[1].sum(), leaf)
    assert slope[1].any() and not slope[0].any() and not slope[2].any()


def test_sampling_starts_from_noise_or_from_the_picture() -> None:
    levels = [images(2, 1, s, s) * 2 - 1 for s in (12, 14, 16)]
    whole = Pictures(levels, 0, picture_rngs(0, [0, 1]))
    assert not whole.before(0).any() and whole.noise(0).shape == (2, 1, 12, 12)
    critic = whole.grow(0, None, 4, 8, [1, 2], norm=False, by_reconstruction=True)
    assert whole.amplitudes[0].flatten().tolist() == [1, 1]
    assert torch.equal(whole.image(0, fixed=True), whole.image(0, fixed=True))
    assert not torch.equal(whole.image(0), whole.image(0))
    whole.grow(1, critic, 4, 8, [3, 4], norm=False, by_reconstruction=True)
    first, second = (net.body[0].weight for net in whole.generators)  # type: ignore[union-attr]
    assert torch.equal(first, second)  # the same width: it goes on from the scale before
    rebuilt = whole.before(1, fixed=True)
    expected = 0.1 * (levels[1] - rebuilt).square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(whole.amplitudes[1].flatten(), expected)
    late = Pictures(levels, 2, picture_rngs(0, [0, 1]))
    below = resized(levels[1], (16, 16))
    assert torch.equal(late.before(2), below) and torch.equal(late.before(2, fixed=True), below)
    assert not late.fixed_noise(2).any()
    late.grow(2, None, 4, 8, [1, 2], norm=False, by_reconstruction=False)
    assert torch.allclose(late.amplitudes[0].flatten(), 0.1 * (levels[2] - below).square().mean((1, 2, 3)).sqrt())


# --- losses -----------------------------------------------------------------------------------------------------


def test_the_critic_descends_fake_minus_real_plus_the_penalty() -> None:
    real, fake, rho = torch.full((2, 1, 2, 2), 0.2), torch.full((2, 1, 2, 2), 0.7), torch.tensor([0.0, 0.5])

    def critic(x: Tensor) -> Tensor:
        return 3 * x

    options: dict[str, Any] = {"weight": 0.1}
    assert critic_loss(critic, real, fake, rho, **options, norm="pixel").tolist() == pytest.approx([1.5 + 0.4] * 2)
    # the value's slope is 3/4 at each of four pixels, so its length is 1.5
    assert critic_loss(critic, real, fake, rho, **options, norm="image").tolist() == pytest.approx([1.5 + 0.025] * 2)


def test_the_penalty_is_taken_between_both_and_per_pixel_over_channels() -> None:
    real, fake = torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2)

    def critic(x: Tensor) -> Tensor:
        return (x.square()).sum(1, keepdim=True)  # slope 2 x, of length 2 sqrt(2) x over two channels

    found = gradient_penalty(critic, real, fake, torch.tensor([0.25]), norm="pixel")
    assert found.item() == pytest.approx((2 * 2**0.5 * 0.75 - 1) ** 2, rel=1e-5)
    flat = gradient_penalty(lambda x: 0 * x[:, :1], real, fake, torch.tensor([0.25]), norm="pixel")
    assert flat.isfinite().all() and flat.item() == pytest.approx(1, abs=1e-4)


# --- the strip -----------------------------------------------------------------------------------------------------


def test_a_strip_has_a_row_for_each_scale(tmp_path: Path) -> None:
    x = torch.full((1, 8, 8), 0.2)
    path = write_strip(tmp_path / "strip.png", x, x + 0.1, [(4, 4), (8, 8)], gain=2.0)
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (2 * 8 + 4, 3 * 8 + 2 * 4, 3) and list(tmp_path.iterdir()) == [path]
    assert (drawn[:8, :8] == 51).all() and (drawn[12:, 12:20] == 76).all() and (drawn[:8, 24:] == 179).all()
    assert (drawn[8:12] == 255).all()
