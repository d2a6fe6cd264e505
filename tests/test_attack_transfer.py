from __future__ import annotations

import pytest
import torch
from attack_toys import Counter, digits, fresh_network, linear_system, system, trained_network
from torch import Tensor

from casemate.attacks.gradient import MIM, PGD
from casemate.attacks.transfer import SourcedTransfer, Transfer
from casemate.errors import UserError
from casemate.system import Offer, System, View
from casemate.threat import ThreatModel, untargeted

LINF = ThreatModel("linf", 0.1)


class Endpoint(System):
    """A victim that gives labels only, one pixel: class 1 above 0.6."""

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


def test_examples_are_crafted_on_the_source_and_judged_by_the_victims_labels() -> None:
    """The source calls an image class 1 above 0.4 already; its slope leads on to where the victim errs too."""
    source = linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([0.4, 0.0]))
    x = torch.tensor([0.55, 0.45, 0.3]).view(3, 1, 1, 1)
    attack = Transfer(steps=8, random_start=False).with_source(source)
    result = attack(Endpoint(), x, untargeted(torch.zeros(3, dtype=torch.long)), LINF)
    assert torch.allclose(result.x_adv, x + 0.1)  # a success on the source does not end the search
    assert result.success.tolist() == [True, False, False]


def test_it_costs_the_sources_passes_and_one_look_at_the_victim() -> None:
    x, y = digits()
    source, victim = Counter(fresh_network()), Counter(trained_network())
    attack = Transfer(steps=4, restarts=2).with_source(system(source, (1, 8, 8), 10))
    deployed = system(victim, (1, 8, 8), 10)
    result = attack(deployed, x[:10], untargeted(y[:10]), LINF)
    assert source.forwards == [10] * 10 and source.gradients == [10] * 8
    assert victim.forwards == [10] and victim.gradients == []
    assert result.cost.forwards.tolist() == [9] * 10 and result.cost.backwards.tolist() == [8] * 10
    assert result.cost.queries.tolist() == [2] * 10
    assert attack.passes(deployed.views()["adaptive"], 10) == (80, 80, 20)
    assert source.training and all(p.requires_grad for p in source.parameters())


@pytest.mark.parametrize(("decay", "twin"), [(0.0, PGD), (1.0, MIM)])
def test_decay_chooses_between_pgd_and_mim(decay: float, twin: type[PGD] | type[MIM]) -> None:
    x, y = digits()
    x, goal = x[:30], untargeted(y[:30])
    source = system(trained_network(), (1, 8, 8), 10)
    sent = Transfer(steps=5, decay=decay, keep="last").with_source(source)(source, x, goal, LINF, 3)
    own = twin(steps=5, relative_step=0.25, keep="last")(source, x, goal, LINF, 3)
    assert torch.allclose(sent.x_adv, own.x_adv)


def test_what_it_crafts_is_strong_on_its_own_source() -> None:
    x, y = digits()
    source = system(trained_network(), (1, 8, 8), 10)
    sent = Transfer().with_source(source)(source, x[1500:], untargeted(y[1500:]), LINF)
    own = PGD()(source, x[1500:], untargeted(y[1500:]), LINF)
    assert int(sent.success.sum()) >= 0.95 * int(own.success.sum())
    far = Transfer().with_source(system(fresh_network(7), (1, 8, 8), 10))
    assert far(source, x[1500:], untargeted(y[1500:]), LINF).success.sum() < own.success.sum() / 2


class Window(Endpoint):
    """Class 1 between 0.605 and 0.645 only: an iterate passes through where the last one no longer is."""

    def decide(self, x: Tensor) -> Tensor:
        return ((x - 0.625).abs().flatten(1)[:, 0] < 0.02).long()


def test_of_all_iterates_one_may_fool_the_victim_where_the_last_does_not() -> None:
    """Steps of 0.025 from 0.55, 0.45 and 0.61: the third step of the first is in the window's middle."""
    source = linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([0.4, 0.0]))
    x = torch.tensor([0.55, 0.45, 0.61]).view(3, 1, 1, 1)
    goal = untargeted(torch.zeros(3, dtype=torch.long))
    options = {"steps": 4, "random_start": False}
    last = Transfer(**options).with_source(source)(Window(), x, goal, LINF)
    every = Transfer(keep="all", **options).with_source(source)(Window(), x, goal, LINF)
    assert last.success.tolist() == [False, False, False]
    assert every.success.tolist() == [True, False, True]
    assert torch.allclose(every.x_adv.flatten(), torch.tensor([0.625, 0.55, 0.61]), atol=1e-6)
    looks = every.cost.queries.tolist()  # the last iterate of the one that stands is only verified
    assert looks[1] == 4 and looks[0] >= 4 and looks[2] >= 1


def test_judging_all_iterates_costs_a_query_of_the_victim_for_each() -> None:
    x, y = digits()
    source, victim = Counter(fresh_network(3)), Counter(trained_network())
    attack = Transfer(steps=5, restarts=2, keep="all").with_source(system(source, (1, 8, 8), 10))
    deployed = system(victim, (1, 8, 8), 10)
    result = attack(deployed, x[1500:1530], untargeted(y[1500:1530]), LINF)
    asked = sum(source.forwards) - int(result.cost.forwards.sum() - 30)  # of the source, without a gradient
    assert sum(victim.forwards) - 30 + asked == int(result.cost.queries.sum())
    assert sum(victim.forwards) - 30 == sum(source.forwards)  # it looks at whatever the source has looked at
    assert sum(source.gradients) == int(result.cost.backwards.sum())
    standing = ~result.success
    assert bool(standing.any()) and result.cost.queries[standing].tolist() == [12] * int(standing.sum())
    assert attack.passes(deployed.views()["adaptive"], 30) == (300, 300, 360)


def test_all_iterates_fell_at_least_what_the_best_one_does() -> None:
    x, y = digits()
    x, goal = x[1500:1600], untargeted(y[1500:1600])
    source, victim = system(fresh_network(7), (1, 8, 8), 10), system(trained_network(), (1, 8, 8), 10)
    best, last, every = (
        Transfer(steps=10, keep=k).with_source(source)(victim, x, goal, ThreatModel("linf", 0.2), 1).success
        for k in ("best", "last", "all")
    )
    assert bool((every | ~best).all()) and bool((every | ~last).all()) and int(every.sum()) > int(best.sum())


def test_one_that_remembers_crafts_once_for_all_victims() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    attack = Transfer(steps=4).with_source(system(counter, (1, 8, 8), 10))
    assert isinstance(attack, SourcedTransfer)
    kept = attack.remembering()
    assert kept.parameters() == attack.parameters()
    goal, victims = untargeted(y[:20]), [system(fresh_network(seed), (1, 8, 8), 10) for seed in (1, 2)]
    results = [kept(victim, x[:20], goal, LINF, 9) for victim in victims]
    assert len(counter.forwards) == 5
    for victim, result in zip(victims, results, strict=True):
        plain = attack(victim, x[:20], goal, LINF, 9)
        assert torch.equal(plain.x_adv, result.x_adv) and torch.equal(plain.success, result.success)
        assert torch.equal(plain.cost.forwards, result.cost.forwards)
        assert torch.equal(plain.cost.queries, result.cost.queries)
    before = len(counter.forwards)
    for again in ((x[:20], LINF, 8), (x[:20], ThreatModel("linf", 0.2), 9), (x[1:21], LINF, 9)):
        kept(victims[0], again[0], goal, again[1], again[2])
    assert len(counter.forwards) == before + 15


def test_the_source_takes_part_in_what_identifies_the_attack() -> None:
    sources = [system(fresh_network(seed), (1, 8, 8), 10) for seed in (0, 0, 1)]
    one, same, other = (Transfer(steps=3).with_source(s).parameters() for s in sources)
    assert one == same and one != other
    assert one["source"] == sources[0].hash() and one["steps"] == 3


def test_a_source_must_be_bound_and_have_gradients() -> None:
    x, y = digits()
    with pytest.raises(UserError, match="attack Transfer needs its source: call with_source first"):
        Transfer()(system(trained_network(), (1, 8, 8), 10), x[:2], untargeted(y[:2]), LINF)
    with pytest.raises(UserError, match="needs gradients of its source, and endpoint offers none"):
        Transfer().with_source(Endpoint())
    with pytest.raises(UserError, match="attack PGD has no source system"):
        PGD().with_source(Endpoint())
