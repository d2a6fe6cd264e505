from __future__ import annotations

import pytest
import torch

from casemate.threat import ThreatModel, radius_text, targeted, untargeted

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)


def image(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_linf_projection_clips_to_the_ball_then_to_the_box() -> None:
    projected = LINF.project(image(0.9, 0.0, -0.5, 1.2), image(0.5, 0.05, 0.05, 0.95))
    assert torch.allclose(projected, image(0.6, 0.0, 0.0, 1.0))


def test_l2_projection_scales_and_leaves_the_inside_alone() -> None:
    x = image(0.5, 0.5)
    assert torch.allclose(L2.project(x + image(0.6, 0.8), x), x + image(0.3, 0.4))
    assert torch.allclose(L2.project(x + image(0.1, -0.2), x), x + image(0.1, -0.2))


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_what_is_projected_is_contained_and_projects_to_itself(threat: ThreatModel) -> None:
    x = torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    far = x + torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    projected = threat.project(far, x)
    assert threat.contains(projected, x).all()
    assert not threat.contains(far, x).any()
    assert torch.allclose(threat.project(projected, x), projected, atol=1e-6)


def test_distance_is_of_each_image() -> None:
    x = torch.zeros(2, 1, 1, 2)
    x_adv = torch.cat([image(0.3, 0.4), image(0.0, 0.0)])
    assert torch.allclose(L2.distance(x_adv, x), torch.tensor([0.5, 0.0]))
    assert torch.allclose(LINF.distance(x_adv, x), torch.tensor([0.4, 0.0]))


def test_contains_refuses_the_ball_the_box_and_what_is_not_finite() -> None:
    x = torch.full((6, 1, 1, 2), 0.95)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.05  # at the edge of the box
    x_adv[1, 0, 0, 0] -= 0.1 + 2e-6
    x_adv[2, 0, 0, 0] += 0.05 + 2e-6
    x_adv[3, 0, 0, 0] = torch.nan
    x_adv[4, 0, 0, 0] -= 0.1
    x_adv[5, 0, 0, 0] = torch.inf
    assert LINF.contains(x_adv, x).tolist() == [True, False, False, False, True, False]
    assert L2.contains(x_adv, x).tolist() == [True, True, False, False, True, False]


def test_random_start_is_uniform_in_the_linf_ball() -> None:
    x = torch.full((100, 1, 10, 10), 0.05)
    delta = LINF.random_start(x, torch.Generator().manual_seed(0)) - x
    assert delta.abs().max() <= 0.1 + 1e-6
    assert delta.mean().abs() < 0.002  # 4 standard errors of 10,000 draws
    assert abs(delta.abs().mean() - 0.05) < 0.002
    assert (x + delta).min() < 0  # not cut to the box


def test_random_start_is_uniform_in_the_l2_ball() -> None:
    x = torch.zeros(20_000, 1, 1, 2)
    radii = L2.distance(L2.random_start(x, torch.Generator().manual_seed(0)), x)
    assert radii.max() <= 0.5 + 1e-6
    inside_half = (radii < 0.25).float().mean()  # a quarter of the area of a disc
    assert abs(inside_half - 0.25) < 0.02


def test_random_start_does_not_depend_on_the_memory_format() -> None:
    x = torch.rand(4, 3, 5, 5)
    strided = x.contiguous(memory_format=torch.channels_last)
    for threat in (LINF, L2):
        plain = threat.random_start(x, torch.Generator().manual_seed(3))
        other = threat.random_start(strided, torch.Generator().manual_seed(3))
        assert torch.equal(plain, other)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_goals() -> None:
    labels, decisions = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, -1, 1])
    assert untargeted(labels).reached(decisions).tolist() == [False, True, False, True]
    goal = targeted(labels, torch.tensor([1, 2, 0, 2]))
    assert goal.reached(decisions).tolist() == [False, True, False, False]
    part = goal[torch.tensor([3, 1])]
    assert part.labels.tolist() == [3, 1] and part.targets is not None and part.targets.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("radius", "text"), [(8 / 255, "8/255"), (0.3, "0.3"), (0.5, "0.5"), (4 / 255, "4/255"), (0, "0"), (0.2, "0.2")]
)
def test_radii_are_written_as_the_field_writes_them(radius: float, text: str) -> None:
    assert radius_text(radius) == text
    assert str(ThreatModel("linf", radius)) == f"linf {text}"
