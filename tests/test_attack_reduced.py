"""bf16 proposes, float32 decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import digits, linear_system, system, trained_network
from torch import Tensor

from casemate.attacks.apgd import APGD
from casemate.attacks.autoattack import AutoAttack
from casemate.attacks.base import Attack, Cost
from casemate.attacks.carlini_wagner import CWL2
from casemate.attacks.gap import GAP
from casemate.attacks.gradient import PGD
from casemate.attacks.reduced import ReducedSearch
from casemate.attacks.spatial import StAdv
from casemate.errors import UserError
from casemate.evaluation.plan import bind_source, build_attack
from casemate.evaluation.schema import EvaluateParams
from casemate.system import View
from casemate.threat import Goal, ThreatModel, untargeted

LINF = ThreatModel("linf", 0.08)


class Nothing(Attack):
    """Hands the clean images over, and remembers in which precision it was asked to look."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        assert view.logits(x).dtype == torch.float32
        self.seen.append((len(x), torch.is_autocast_enabled(x.device.type)))
        cost.forwards += 1
        return x

    def parameters(self) -> dict[str, Any]:
        return {}

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return n, 0, 0


def test_it_leaves_no_more_than_the_search_in_float32() -> None:
    x, y = digits()
    x, y = x[1500:1600], y[1500:1600]
    victim = system(trained_network(), (1, 8, 8), 10)
    inner = AutoAttack(steps=20, targets=3, queries=200, diagnose=False)
    full = inner(victim, x, untargeted(y), LINF, 0)
    half = ReducedSearch(inner)(victim, x, untargeted(y), LINF, 0)
    assert bool(LINF.contains(half.x_adv, x).all())
    assert torch.equal(half.success, victim.decide(half.x_adv) != y)
    assert int(half.success.sum()) >= int(full.success.sum()) > 20


def test_what_falls_in_bf16_alone_is_searched_again_in_float32() -> None:
    """z = (1, 1 + x): bf16 rounds 1.001 to 1, and its arg max is then class 0, which is wrong."""
    victim = linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 1.0]))
    x, y = torch.tensor([0.001, 0.5]).view(2, 1, 1, 1), torch.ones(2, dtype=torch.long)
    inner = Nothing()
    result = ReducedSearch(inner, finish=1)(victim, x, untargeted(y), ThreatModel("linf", 1e-4))
    assert inner.seen == [(2, True), (1, False)]
    assert result.success.tolist() == [False, False]
    assert result.cost.forwards.tolist() == [4, 3]  # one more; a step of the finish, and the verification
    assert result.cost.queries.tolist() == [5, 4]


def test_every_survivor_meets_apgd_in_float32() -> None:
    x, y = digits()
    x, y = x[1500:1560], y[1500:1560]
    victim = system(trained_network(), (1, 8, 8), 10)
    result = ReducedSearch(Nothing(), finish=20)(victim, x, untargeted(y), LINF)
    apgd = APGD(objective="margin", steps=20)(victim, x, untargeted(y), LINF)
    assert int(result.success.sum()) >= int(apgd.success.sum()) - 2 > 10  # their noise differs
    attacked = victim.decide(x) == y
    assert bool((result.cost.backwards[attacked & ~result.success] == 20).all())


def test_the_bound_on_its_passes_holds() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = ReducedSearch(PGD(steps=5))
    cost = attack(victim, x[:30], untargeted(y[:30]), LINF).cost
    spent = tuple(int(part.sum()) for part in (cost.forwards - 1, cost.backwards, cost.queries))
    assert all(a <= b for a, b in zip(spent, attack.passes(victim.views()["adaptive"], 30), strict=True))


def test_budgets_of_their_own_and_unbound_attacks_are_refused() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    for inner in (StAdv(steps=2), CWL2(steps=2)):
        with pytest.raises(UserError, match="budget of its own"):
            ReducedSearch(inner)(victim, x[:2], untargeted(y[:2]), LINF)
    with pytest.raises(UserError, match="weights"):
        ReducedSearch(GAP())


def test_an_attack_of_a_suite_may_say_so_and_is_another_attack_then() -> None:
    suites = {"core": {"attacks": {"half": {"attack": "pgd", "search": "bf16"}, "full": {"attack": "pgd"}}}}
    cells = EvaluateParams.model_validate({"suites": suites}).suites["core"].attacks
    half, full = (build_attack(name, cells[name], 1.0, bind_source(None)) for name in ("half", "full"))
    assert isinstance(half, ReducedSearch) and isinstance(full, PGD)
    assert half.parameters() == {
        "inner": "casemate.attacks.gradient:PGD", **full.parameters(), "search": "bf16", "finish": 20,
    }  # fmt: skip
