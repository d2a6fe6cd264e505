"""The second engine and its optimizers, against torch.optim, closed forms and counted passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attack_toys import Counter
from torch import Tensor, nn

from casemate.attacks.ascent import sign_step
from casemate.attacks.base import Cost
from casemate.attacks.minimise import (
    Found,
    Live,
    Parametrisation,
    Pixels,
    TanhBox,
    Task,
    at_success,
    by_margin,
    minimise,
    never,
    unjudged,
)
from casemate.attacks.optimizers import LBFGS, Adam, Descent, Optimizer
from casemate.system import View
from casemate.threat import Goal, ThreatModel, untargeted


def view_of(network: nn.Module, exact: bool = True, passes: tuple[int, int] = (1, 1)) -> View:
    return View("toy", network, exact, frozenset({"gradient", "scores", "labels"}), passes)


def goal_of(n: int) -> Goal:
    return untargeted(torch.zeros(n, dtype=torch.long))


class Free(Parametrisation):
    """The pixels themselves, without any bound."""

    def start(self, x: Tensor) -> Tensor:
        return x.clone()

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        return variables


def rosenbrock(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
    """0 at (1, ..., 1); the logits are the pixels."""
    head, tail = logits[:, :-1], logits[:, 1:]
    return (100 * (tail - head**2) ** 2 + (1 - head) ** 2).sum(1)


def value_itself(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
    return values


def down_to(threshold: float) -> Any:
    return lambda live, values, step: live.score < threshold


def search(task: Task, x: Tensor, network: nn.Module | None = None) -> tuple[Found, Cost]:
    cost = Cost.zero(len(x))
    return minimise(task, view_of(network or nn.Flatten()), x, goal_of(len(x)), cost), cost


START = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_adam_is_the_adam_of_torch_for_each_image() -> None:
    leaf = START.clone().requires_grad_()
    reference = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(30):
        reference.zero_grad()
        rosenbrock(leaf.flatten(1), leaf, None).sum().backward()  # type: ignore[arg-type]
        reference.step()
    found, _ = search(Task(Free(), Adam(0.05), rosenbrock, unjudged, 30), START)
    assert torch.allclose(found.last, leaf, atol=1e-5)


def test_adam_without_memory_takes_steps_of_its_rate() -> None:
    def slope(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        return logits @ torch.tensor([1.0, -2.0, 1e-3, 0.0])

    found, _ = search(Task(Free(), Adam(0.1, betas=(0.0, 0.0)), slope, unjudged, 2), START)
    moved = torch.tensor([-0.2, 0.2, -0.2, 0.0]).view(1, 2, 2)
    assert torch.allclose(found.last - START, moved.expand_as(START), atol=1e-5)


def test_plain_descent_by_hand() -> None:
    def bowl(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        return logits.square().sum(1)

    found, _ = search(Task(Free(), Descent(0.1), bowl, unjudged, 3), START)
    assert torch.allclose(found.last, START * 0.8**3)
    found, _ = search(Task(Free(), Descent(0.1, sign_step), bowl, unjudged, 3), START + 1)
    assert torch.allclose(found.last, START + 0.7)


def test_lbfgs_goes_where_adam_needs_far_longer() -> None:
    """The Rosenbrock valley; scipy's L-BFGS-B needs about 40 evaluations from here too."""
    fast, cost = search(Task(Free(), LBFGS(), rosenbrock, value_itself, 100, down_to(1e-6)), START)
    assert bool((fast.score < 1e-6).all()) and int(cost.forwards.max()) < 80
    assert torch.allclose(fast.x_adv, torch.ones_like(START), atol=5e-3)
    slow, _ = search(Task(Free(), Adam(0.02), rosenbrock, value_itself, 100, down_to(1e-6)), START)
    assert bool((slow.score > 100 * fast.score).all())


def test_lbfgs_learns_the_scales_of_a_quadratic() -> None:
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found, _ = search(Task(Free(), LBFGS(), lambda z, x, live: (scale * z**2).sum(1), value_itself, 30), START)
    assert bool((found.score < 1e-8).all())


def test_lbfgs_gets_past_a_kink() -> None:
    """|a - b| + (a + b)^2: across the valley of the kink no curvature helps, so the memory must be dropped."""

    def creased(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        a, b = logits[:, 0], logits[:, 1]
        return (a - b).abs() + (a + b) ** 2

    found, _ = search(Task(Free(), LBFGS(), creased, value_itself, 200), START)
    assert bool((found.score < 0.02).all())


@pytest.mark.parametrize("optimizer", [Adam(0.05), LBFGS(), Descent(1e-3)], ids=lambda o: type(o).__name__)
def test_an_image_alone_ends_where_it_ends_among_others_that_leave(optimizer: Optimizer) -> None:
    task = Task(Free(), optimizer, rosenbrock, value_itself, 60, down_to(0.5))
    together, cost = search(task, START)
    assert len(set(cost.forwards.tolist())) > 1  # they leave at different steps
    for i in range(len(START)):
        alone, own = search(task, START[i : i + 1])
        for name in ("x_adv", "score", "variables", "last"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])
        assert int(own.forwards) <= int(cost.forwards[i])


def test_every_pass_is_counted_and_finished_images_leave() -> None:
    counter = Counter(nn.Flatten())
    own = {"until": torch.tensor([1, 2, 2, 5, 9, 9])}

    def until(live: Live, values: Tensor, step: int) -> Tensor:
        return live.own["until"] <= step

    cost = Cost.zero(6)
    task = Task(Free(), Adam(0.01), rosenbrock, unjudged, 7, until)
    minimise(task, view_of(counter, passes=(3, 2)), START, goal_of(6), cost, own)
    assert counter.forwards == [6, 6, 5, 3, 3, 3, 2]
    assert counter.gradients == [6, 6, 5, 3, 3, 3, 2]  # those that finish are still in the batch when it is taken
    assert cost.forwards.tolist() == [6, 9, 9, 18, 21, 21]
    assert cost.backwards.tolist() == [4, 6, 6, 12, 14, 14]
    assert cost.queries.tolist() == [0] * 6


def test_when_the_last_image_is_finished_no_gradient_is_paid() -> None:
    counter, cost = Counter(nn.Flatten()), Cost.zero(6)
    task = Task(Free(), Adam(0.01), rosenbrock, value_itself, 7, at_success)
    found = minimise(task, view_of(counter), START, goal_of(6), cost)
    assert counter.forwards == [6] and counter.gradients == []
    assert cost.forwards.tolist() == [1] * 6 and cost.backwards.tolist() == [0] * 6
    assert torch.equal(found.x_adv, START) and torch.equal(found.last, START)


def test_the_best_iterate_is_kept_and_nothing_where_none_is_acceptable() -> None:
    """Descent with too long a step: values fall, then grow."""

    def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
        return values.masked_fill(live.rows % 2 == 1, torch.inf)

    def bowl(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        return (logits.square() * torch.tensor([1.0, 1.0, 1.0, 11.0])).sum(1)

    x = torch.tensor([1.0, 1.0, 1.0, 0.01]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    found, _ = search(Task(Free(), Descent(0.1), bowl, judge, 30), x)
    values = [float(bowl(x.flatten(1) * torch.tensor([0.8, 0.8, 0.8, -1.2]) ** t, x, None)[0]) for t in range(30)]  # type: ignore[arg-type]
    best = values.index(min(values))
    assert 5 < best < 25 and float(found.score[0]) == pytest.approx(values[best], rel=1e-5)
    assert torch.allclose(
        found.x_adv[0], (x[0].flatten() * torch.tensor([0.8, 0.8, 0.8, -1.2]) ** best).view(1, 2, 2)
    )
    assert torch.equal(found.variables[0], found.x_adv[0])
    assert bool(found.score[1].isinf()) and torch.equal(found.x_adv[1], x[1])
    assert torch.equal(found.last[0], found.last[1])


@dataclass
class Pair(Parametrisation):
    """Two images of each variable: v + 1, and v - 1."""

    draws: int = field(default=2, init=False)

    def start(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        both = torch.cat([variables + 1, variables - 1])
        return both.view(-1, 1, 1, 1).expand(-1, *live.x.shape[1:])


def test_several_images_of_one_variable_are_counted_and_the_best_is_kept() -> None:
    x = torch.tensor([0.3, -0.4]).view(2, 1, 1, 1).expand(2, 1, 2, 2).contiguous()

    def mean_square(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        return logits[:, 0].view(2, -1).square().mean(0)

    def nearness(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
        return logits[:, 0].view(2, -1).abs()

    counter, cost = Counter(nn.Flatten()), Cost.zero(2)
    found = minimise(
        Task(Pair(), Descent(0.0), mean_square, nearness, 3), view_of(counter, passes=(1, 2)), x, goal_of(2), cost
    )
    assert counter.forwards == [4, 4, 4]
    assert cost.forwards.tolist() == [6, 6] and cost.backwards.tolist() == [12, 12]
    assert torch.allclose(found.x_adv[:, 0, 0, 0], torch.tensor([-0.7, 0.6]))  # 0.3 - 1 and -0.4 + 1
    assert torch.allclose(found.score, torch.tensor([0.7, 0.6]))


def test_only_the_images_asked_for_are_searched() -> None:
    counter, cost = Counter(nn.Flatten()), Cost.zero(6)
    among = torch.tensor([True, False, True, False, False, True])
    task = Task(Free(), Adam(0.05), rosenbrock, value_itself, 10)
    found = minimise(task, view_of(counter), START, goal_of(6), cost, {"unused": torch.arange(6)}, among=among)
    whole, _ = search(task, START)
    assert torch.equal(found.last[among], whole.last[among]) and torch.equal(found.last[~among], START[~among])
    assert bool(found.score[~among].isinf().all()) and counter.forwards == [3] * 10
    assert cost.forwards.tolist() == [10, 0, 10, 0, 0, 10]
    none = minimise(task, view_of(counter), START, goal_of(6), cost, among=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(none.x_adv, START) and len(counter.forwards) == 10


def test_the_last_iterate_is_judged_by_a_query_where_that_is_asked() -> None:
    counter, cost = Counter(nn.Flatten()), Cost.zero(6)
    whole, _ = search(Task(Free(), Adam(0.05), rosenbrock, value_itself, 11), START)
    task = Task(Free(), Adam(0.05), rosenbrock, value_itself, 10, judge_last=True)
    found = minimise(task, view_of(counter), START, goal_of(6), cost)
    assert torch.equal(found.score, whole.score) and torch.equal(found.x_adv, whole.x_adv)
    assert counter.forwards == [6] * 11 and counter.gradients == [6] * 10
    assert cost.forwards.tolist() == [10] * 6 and cost.queries.tolist() == [1] * 6


def test_an_estimate_takes_the_place_of_the_gradient_and_evaluations_are_queries() -> None:
    counter, cost = Counter(nn.Flatten()), Cost.zero(6)

    def exact(live: Live, step: int) -> Tensor:
        with torch.enable_grad():
            leaf = live.variables.clone().requires_grad_()
            return torch.autograd.grad(rosenbrock(leaf.flatten(1), leaf, live).sum(), leaf)[0]

    def leave(live: Live, values: Tensor, step: int) -> Tensor:
        return (live.rows == 4) & (step == 3)

    task = Task(Free(), Adam(0.05), rosenbrock, unjudged, 10, leave, estimate=exact)
    found = minimise(task, view_of(counter), START, goal_of(6), cost)
    whole, _ = search(Task(Free(), Adam(0.05), rosenbrock, unjudged, 10), START)
    others = torch.arange(6) != 4
    assert torch.allclose(found.last[others], whole.last[others], atol=1e-6)
    assert counter.forwards == [6] * 4 + [5] * 6 and counter.gradients == []
    assert cost.queries.tolist() == [10, 10, 10, 10, 4, 10] and cost.forwards.sum() == 0


def test_the_tanh_box_begins_at_the_image_and_never_leaves_the_box() -> None:
    box, x = TanhBox(), torch.tensor([0.0, 1.0, 0.5, 0.123]).view(1, 1, 2, 2)
    start = box.start(x)
    live: Any = None
    assert bool(start.isfinite().all()) and torch.allclose(box.image(start, live, 0), x, atol=1e-6)
    pushed = box.image(start + torch.tensor([-99.0, 99.0, 99.0, -99.0]).view(1, 1, 2, 2), live, 0)
    assert pushed.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pixels_stay_in_the_ball(norm: Any) -> None:
    threat = ThreatModel(norm, 0.1)

    def upward(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        return -logits.sum(1)

    found, _ = search(Task(Pixels(threat), Adam(0.05), upward, value_itself, 30), START)
    assert bool(threat.contains(found.x_adv, START).all()) and bool(threat.contains(found.last, START).all())
    moved = 0.1 if norm == "linf" else 0.05
    assert torch.allclose(found.last, (START + moved).clamp(max=1), atol=1e-5)
    start = Pixels(threat, START + 5).start(START)
    assert bool(threat.contains(start, START).all()) and bool((start > START).all())


def test_scores_by_margin_are_successes_where_the_view_shows_them() -> None:
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    live: Any = type("Batch", (), {"goal": goal_of(2)})
    exact, other = (by_margin(view_of(nn.Flatten(), e))(logits, logits, logits[:, 0], live) for e in (True, False))
    assert exact.tolist() == [torch.inf, -2.0] and other.tolist() == [2.0, -2.0]
    assert never(live, logits, 0) is None
