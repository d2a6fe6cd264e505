"""Several systems as one source of transfer attacks."""

from __future__ import annotations

import pytest
import torch
from attack_toys import digits, system, trained_network
from test_attack_adaptive import imt_system
from torch import nn

from casemate.attacks.gradient import PGD
from casemate.attacks.transfer import Transfer
from casemate.ensemble import Ensemble
from casemate.errors import UserError
from casemate.evaluation import keys
from casemate.system import System
from casemate.threat import ThreatModel, untargeted


class Fixed(nn.Module):
    """The same logits for every image, with a slope of their own."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values + 0.0 * x.flatten(1).sum(1, keepdim=True)


def of(model: nn.Module, classes: int = 2) -> System:
    return system(model, (1, 2, 2), classes)


def test_the_answer_is_the_mean_of_the_probabilities() -> None:
    both = Ensemble({"a": of(Fixed(0.0, 2.0)), "b": of(Fixed(3.0, -1.0))})
    wanted = (torch.tensor([0.0, 2.0]).softmax(0) + torch.tensor([3.0, -1.0]).softmax(0)) / 2
    torch.testing.assert_close(both.logits(torch.rand(3, 1, 2, 2)).exp(), wanted.expand(3, 2))
    assert both.name == "a + b" and both.decide(torch.rand(3, 1, 2, 2)).tolist() == [0, 0, 0]


def test_an_attack_on_it_pays_for_every_member_and_fools_the_whole() -> None:
    x, y = digits()
    plain, purified = system(trained_network(), (1, 8, 8), 10), imt_system(trained_network())
    both = Ensemble({"plain": plain, "purified": purified})
    view = both.views()["adaptive"]
    assert view.exact and view.passes == (1 + 2, 1 + 2)
    assert both.decision_passes() == (1 + 2, 0 + 1)
    torch.testing.assert_close(view.logits(x[:5]), both.logits(x[:5]))
    goal = untargeted(y[:20])
    result = PGD(steps=10)(both, x[:20], goal, ThreatModel("linf", 0.2))
    assert result.success.float().mean() > 0.8
    assert torch.equal(result.prediction, both.decide(result.x_adv))
    assert all(p.requires_grad for p in plain.classifier.parameters())  # type: ignore[attr-defined]


def test_it_is_a_source_of_transfer_attacks_known_by_its_members() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    torch.manual_seed(5)
    other = system(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8), 10)
    both = Ensemble({"victim": victim, "other": other})
    attack = Transfer(steps=10).with_source(both)
    result = attack(victim, x[:20], untargeted(y[:20]), ThreatModel("linf", 0.3))
    assert result.success.float().mean() > 0.5
    assert both.hash() != Ensemble({"other": other, "victim": victim}).hash() != victim.hash()


def test_the_code_of_its_members_is_code_of_its_own() -> None:
    plain, purified = system(trained_network(), (1, 8, 8), 10), imt_system(trained_network())
    codes = [keys.system_code(Ensemble({"a": plain, "b": other})) for other in (plain, purified)]
    assert codes[0] != codes[1] and codes[0] != keys.system_code(plain)


def test_what_cannot_be_an_ensemble_is_said() -> None:
    one = of(Fixed(0.0, 1.0))
    with pytest.raises(UserError, match="needs two members or more, and one has 1"):
        Ensemble({"one": one})
    with pytest.raises(UserError, match="three takes other images or has other classes"):
        Ensemble({"one": one, "three": of(Fixed(0.0, 1.0, 2.0), 3)})
    silent = of(Fixed(0.0, 1.0))
    silent.offers = frozenset({"labels"})
    with pytest.raises(UserError, match="silent offers no gradient"):
        Ensemble({"one": one, "silent": silent})
