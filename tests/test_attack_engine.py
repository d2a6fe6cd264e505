"""What the loop runs, keeps and pays for; and what the closed base class guarantees around it."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from torch import Tensor, nn

from casemate.attacks import engine
from casemate.attacks.base import Attack, AttackResult, Cost
from casemate.attacks.gradient import FGSM, MIM, PGD, CWMargin
from casemate.errors import UserError
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.system import Offer, System, TorchSystem, View
from casemate.threat import Goal, ThreatModel, untargeted

LINF = ThreatModel("linf", 0.1)
RAMP = {"random_start": False, "step_size": 0.04}


def ramp() -> tuple[TorchSystem, Counter, Tensor, Goal]:
    """One pixel, class 1 above 0.6, label 0. With steps of 0.04 the images fall at iterate 1, 2, 4 and never."""
    counter = Counter(linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([0.6, 0.0])).classifier)
    x = torch.tensor([0.58, 0.53, 0.47, 0.1]).view(4, 1, 1, 1)
    return system(counter, (1, 1, 1), 2), counter, x, untargeted(torch.zeros(4, dtype=torch.long))


def standing(n: int = 8) -> tuple[TorchSystem, Counter, Tensor, Goal]:
    """Digits that a radius of 0.001 cannot change, so that every pass is made for all of them."""
    x, y = digits()
    right = trained_network()(x).argmax(1) == y
    counter = Counter(trained_network())
    return system(counter, (1, 8, 8), 10), counter, x[right][:n], untargeted(y[right][:n])


# --- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "steps"),
    [(FGSM(), 1), (PGD(steps=7), 7), (PGD(steps=7, keep="last"), 7), (MIM(steps=5), 5), (CWMargin(steps=6), 6)],
    ids=lambda p: type(p).__name__ if isinstance(p, Attack) else None,
)
def test_k_steps_cost_k_forwards_and_k_input_gradients_and_nothing_else(attack: Attack, steps: int) -> None:
    victim, counter, x, goal = standing()
    paid: list[Tensor] = []
    for parameter in counter.parameters():
        parameter.register_hook(paid.append)
    result = attack(victim, x, goal, ThreatModel("linf", 0.001))
    assert counter.forwards == [8] * (steps + 1)  # and the verification
    assert counter.gradients == [8] * steps
    assert not paid and all(p.grad is None for p in counter.parameters())
    assert not x.requires_grad and not result.x_adv.requires_grad
    assert result.cost.forwards.tolist() == [steps + 1] * 8
    assert result.cost.backwards.tolist() == [steps] * 8
    assert result.cost.queries.tolist() == [0] * 8
    assert attack.passes(victim.views()["adaptive"], 8) == (8 * steps, 8 * steps, 0)


def test_each_image_pays_until_it_falls() -> None:
    victim, counter, x, goal = ramp()
    result = PGD(steps=5, **RAMP)(victim, x, goal, ThreatModel("linf", 0.3))
    assert torch.allclose(result.x_adv.flatten(), torch.tensor([0.62, 0.61, 0.63, 0.3]))
    assert result.success.tolist() == [True, True, True, False]
    assert counter.forwards == [4, 4, 3, 2, 2, 4]
    assert counter.gradients == [4, 4, 3, 2, 2]
    assert result.cost.forwards.tolist() == [3, 4, 6, 6]
    assert result.cost.backwards.tolist() == [2, 3, 5, 5]


def test_the_search_ends_with_the_last_image_and_the_last_forward_needs_no_gradient() -> None:
    victim, counter, x, goal = ramp()
    result = PGD(steps=50, **RAMP)(victim, x[:2], goal[torch.arange(2)], ThreatModel("linf", 0.3))
    assert counter.forwards == [2, 2, 1, 2] and counter.gradients == [2, 2]
    assert result.cost.forwards.tolist() == [3, 4] and result.cost.backwards.tolist() == [2, 2]


def test_restarts_are_only_run_on_survivors_and_their_last_iterates_are_judged() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim, goal = system(counter, (1, 8, 8), 10), untargeted(y[:200])
    attack = PGD(steps=2, restarts=3, keep="last")
    result = attack(victim, x[:200], goal, LINF)
    sizes = counter.forwards
    survivors, fewer = sizes[3], sizes[6]
    assert 200 > survivors > fewer > 0
    assert sizes == [200] * 3 + [survivors] * 3 + [fewer] * 2 + [200]  # two steps, a query; the verification
    assert counter.gradients == [200] * 2 + [survivors] * 2 + [fewer] * 2
    first = PGD(steps=2, keep="last")(victim, x[:200], goal, LINF)
    assert int((~first.success).sum()) == survivors
    assert torch.equal(result.x_adv[first.success], first.x_adv[first.success])
    assert result.cost.queries.sum() == 200 + survivors
    assert result.cost.forwards.sum() == 2 * (200 + survivors + fewer) + 200
    assert attack.passes(victim.views()["adaptive"], 200) == (1200, 1200, 400)


def test_check_every_changes_the_cost_and_not_the_result() -> None:
    victim, _, x, goal = ramp()
    often, seldom = (
        PGD(steps=5, check_every=every, **RAMP)(victim, x, goal, ThreatModel("linf", 0.3)) for every in (1, 4)
    )
    assert torch.equal(often.x_adv, seldom.x_adv)
    assert often.cost.forwards.tolist() == [3, 4, 6, 6]
    assert seldom.cost.forwards.tolist() == [6, 6, 6, 6]  # iterate 4 is looked at, and dropped after its gradient


# --- which iterate ------------------------------------------------------------------------------------------------


def test_last_keeps_the_last_iterate_even_where_an_earlier_one_succeeded() -> None:
    victim, counter, x, goal = ramp()
    result = PGD(steps=5, keep="last", **RAMP)(victim, x, goal, ThreatModel("linf", 0.3))
    assert torch.allclose(result.x_adv.flatten(), x.flatten() + 0.2)
    assert counter.forwards == [4] * 6


class Hill(nn.Module):
    """One pixel: the margin of class 1 is highest at 0.5, and negative everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([torch.ones_like(x), -(x - 0.5).abs()], dim=1)


class Inexact(TorchSystem):
    """As a system that changes its inference shows its classifier: success cannot be seen."""

    def views(self) -> dict[str, View]:
        return {name: View(name, self.classifier, False, self.offers) for name in ("static", "adaptive")}


def test_on_a_view_that_is_not_exact_the_highest_objective_is_kept() -> None:
    counter = Counter(Hill())
    victim = Inexact(counter, input_shape=(1, 1, 1), num_classes=2)
    x, goal = torch.tensor([0.41, 0.28]).view(2, 1, 1, 1), untargeted(torch.zeros(2, dtype=torch.long))
    result = PGD(steps=4, random_start=False, step_size=0.1)(victim, x, goal, ThreatModel("linf", 0.5))
    # .41 -> .51, .41, .51, .41; .28 -> .38, .48, .58, .48
    assert torch.allclose(result.x_adv.flatten(), torch.tensor([0.51, 0.48]))
    assert counter.forwards == [2] * 6  # four steps, a query for the last iterate, the verification
    assert result.cost.queries.tolist() == [1, 1]
    last = PGD(steps=4, random_start=False, step_size=0.1, keep="last")(victim, x, goal, ThreatModel("linf", 0.5))
    assert torch.allclose(last.x_adv.flatten(), torch.tensor([0.41, 0.48]))
    assert last.cost.queries.tolist() == [0, 0]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_on_a_view_that_is_not_exact_no_image_leaves_early(keep: Any) -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim = Inexact(counter, input_shape=(1, 8, 8), num_classes=10)
    attack = PGD(steps=3, restarts=2, keep=keep)
    result = attack(victim, x[:20], untargeted(y[:20]), ThreatModel("linf", 0.3))
    assert counter.forwards == [20] * 9 and counter.gradients == [20] * 6
    assert attack.passes(victim.views()["static"], 20) == (120, 120, 40)
    assert result.cost.queries.tolist() == [2] * 20


def test_an_image_that_is_wrong_at_once_stays_as_it_is() -> None:
    victim, _, x, _ = ramp()
    wrong = torch.full((1, 1, 1, 1), 0.7)
    result = PGD(steps=5, **RAMP)(victim, torch.cat([x, wrong]), untargeted(torch.zeros(5).long()), LINF)
    assert result.success[4] and torch.equal(result.x_adv[4:], wrong)
    assert result.cost.forwards[4] == 2


def test_known_clean_errors_come_back_untouched() -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y)
    clean = victim.decide(x)
    wrong = clean != y
    assert wrong.sum() > 10
    result = PGD(steps=2)(victim, x, goal, LINF, clean=clean)
    assert torch.equal(result.x_adv[wrong], x[wrong]) and result.success[wrong].all()
    assert torch.equal(result.x_adv[~wrong], PGD(steps=2)(victim, x, goal, LINF).x_adv[~wrong])


# --- what a result depends on -------------------------------------------------------------------------------------

SEEDED: list[Attack] = [FGSM(random_start=True), PGD(steps=4, restarts=2), MIM(steps=4), CWMargin(steps=4)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", SEEDED, ids=lambda a: type(a).__name__)
def test_results_are_decided_by_the_seed_and_leave_the_global_one_alone(attack: Attack, norm: Any) -> None:
    x, y = digits()
    victim, goal, threat = system(trained_network(), (1, 8, 8), 10), untargeted(y[:16]), ThreatModel(norm, 0.1)
    state = torch.get_rng_state()
    one, again, other = (attack(victim, x[:16], goal, threat, seed).x_adv for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_do_not_depend_on_when_fallen_images_leave(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y[1500:])
    results: list[AttackResult] = []
    for share in (0.0, 0.1, 1.0):
        monkeypatch.setattr(engine, "COMPACT_ABOVE", share)
        results.append(MIM(steps=8, restarts=2)(victim, x[1500:], goal, ThreatModel(norm, 0.12)))
    soon, usual, never = results
    assert torch.allclose(soon.x_adv, never.x_adv, atol=1e-6) and torch.allclose(usual.x_adv, never.x_adv, atol=1e-6)
    assert torch.equal(soon.success, never.success) and torch.equal(usual.success, never.success)
    assert soon.cost.forwards.sum() <= usual.cost.forwards.sum() < never.cost.forwards.sum()


class Shelf(nn.Module):
    """Class 1 where the first pixel exceeds one half; the slope is zero below."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        return torch.stack([first * 0 + 0.1, (first - 0.4).clamp(min=0)], dim=1)


def test_random_directions_belong_to_the_image_and_not_to_its_place_in_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim, x = system(Shelf(), (1, 1, 3), 2), torch.full((4, 1, 1, 3), 0.2)
    x[0] = x[2] = 0.9  # wrong at once
    goal = untargeted(torch.zeros(4, dtype=torch.long))
    wandered = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(engine, "COMPACT_ABOVE", share)
        wandered.append(PGD(steps=4, step_size=0.02, random_start=False)(victim, x, goal, ThreatModel("l2", 0.1)))
    assert torch.equal(wandered[0].x_adv, wandered[1].x_adv)
    assert wandered[0].success.tolist() == [True, False, True, False]
    assert not torch.allclose(wandered[0].x_adv[1], x[1]) and torch.equal(wandered[0].x_adv[0], x[0])


def test_a_restart_begins_without_momentum() -> None:
    """One step up a hill from two fresh starts: the second goes towards the top, whichever way the first went."""
    victim, x = system(Hill(), (1, 1, 1), 2), torch.full((50, 1, 1, 1), 0.5)
    threat, goal = ThreatModel("linf", 0.4), untargeted(torch.zeros(50, dtype=torch.long))
    first, second = (threat.random_start(x, generator(0, "restart", r)) for r in (0, 1))
    assert ((first < 0.5) != (second < 0.5)).any()
    result = MIM(steps=1, step_size=0.01, restarts=2)(victim, x, goal, threat)
    assert torch.allclose(result.x_adv, second + 0.01 * (0.5 - second).sign())


def test_an_image_does_not_feel_what_becomes_of_the_others() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    attack, threat = PGD(steps=6, restarts=2), ThreatModel("linf", 0.12)
    alone = attack(victim, x[:32], untargeted(y[:32]), threat)
    labels = y[:32].clone()
    labels[::2] = (labels[::2] + 1) % 10  # half of the chunk is now wrong from the start
    among = attack(victim, x[:32], untargeted(labels), threat)
    assert among.success[::2].all() and not alone.success.all()
    assert torch.allclose(alone.x_adv[1::2], among.x_adv[1::2], atol=1e-6)


# --- the base class -----------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = copy.deepcopy(trained_network()), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of memory")
        assert not self.training and not any(p.requires_grad for p in self.parameters())
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("steps", [2, 5])
def test_modes_and_flags_are_put_back_also_after_an_exception(steps: int) -> None:
    model = Failing()
    model.train()
    model.inner.body["conv2"].eval()
    first = next(model.parameters()).requires_grad_(False)
    x, y = digits()
    victim = system(model, (1, 8, 8), 10)
    if steps == 2:
        model.calls = 10
        PGD(steps=2)(victim, x[:4], untargeted(y[:4]), LINF)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            PGD(steps=5)(victim, x[:4], untargeted(y[:4]), LINF)
    assert model.training and not model.inner.body["conv2"].training and model.inner.body["conv1"].training
    assert [p.requires_grad for p in model.parameters()] == [p is not first for p in model.parameters()]


class Cheat(Attack):
    def __init__(self, how: Tensor) -> None:
        self.how = how

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return x + self.how


@pytest.mark.parametrize("how", [0.11, -0.6, torch.nan], ids=["ball", "box", "nan"])
def test_leaving_the_budget_is_caught_and_the_image_named(how: float) -> None:
    victim, _, x, goal = ramp()
    by = torch.zeros(4, 1, 1, 1)
    by[2] = how
    threat = ThreatModel("linf", 1.0) if how == -0.6 else LINF
    with pytest.raises(AssertionError, match="Cheat left its budget at image 2"):
        Cheat(by)(victim, x, goal, threat)


class LabelsOnly(System):
    name, input_shape, num_classes = "endpoint", (1, 1, 1), 2
    offers: frozenset[Offer] = frozenset({"labels"})

    def logits(self, x: Tensor) -> Tensor:
        raise AssertionError("it offers no scores")

    def decide(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, 0] > 0.6).long()

    def views(self) -> dict[str, View]:
        return {"adaptive": View("adaptive", self.logits, False, self.offers)}

    def hash(self) -> str:
        return "endpoint"


def test_an_attack_that_needs_more_than_is_offered_is_refused() -> None:
    _, _, x, goal = ramp()
    with pytest.raises(UserError, match="attack PGD needs gradient, and endpoint offers only labels"):
        PGD()(LabelsOnly(), x, goal, LINF)


def test_an_unknown_view_is_refused() -> None:
    victim, _, x, goal = ramp()
    with pytest.raises(UserError, match="classifier has no view 'adaptiv'; views: static, adaptive"):
        PGD()(victim, x, goal, LINF, view="adaptiv")


class Corner(Attack):
    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return threat.project(x + threat.radius, x)


def test_success_is_the_systems_own_decision() -> None:
    _, _, x, goal = ramp()
    result = Corner()(LabelsOnly(), x, goal, LINF)
    assert result.prediction.tolist() == [1, 1, 0, 0] and result.success.tolist() == [True, True, False, False]
    assert result.cost.forwards.tolist() == [1] * 4
    with pytest.raises(NotImplementedError):
        Corner().passes(LabelsOnly().views()["adaptive"], 4)


def test_parameters_identify_the_attack() -> None:
    assert PGD(steps=3).parameters() == {
        "steps": 3, "step_size": None, "relative_step": None, "restarts": 1, "random_start": True, "keep": "best",
        "check_every": 1, "objective": "ce",
    }  # fmt: skip
    assert MIM().parameters()["decay"] == 1.0 and CWMargin().parameters()["kappa"] == 50.0


def test_hooks_can_be_exchanged() -> None:
    """The loop knows nothing of signs: a plan with its own step, direction and projection."""
    _, _, x, goal = ramp()
    down = engine.Plan(
        cross_entropy, steps=3, step_size=0.05, random_start=False, keep="last",
        step=lambda gradient, before: gradient if before is None else before,
        normalise=lambda climbed: -torch.ones_like(climbed),
        project=lambda x, threat: lambda at: torch.maximum(at, x - 0.12),
    )  # fmt: skip
    view = linear_system(torch.tensor([[0.0], [1.0]])).views()["adaptive"]
    out = engine.Climb(view, x, goal, LINF, 0, Cost.zero(4), down).run()
    assert torch.allclose(out, x - 0.12)
