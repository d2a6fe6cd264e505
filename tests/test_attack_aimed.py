"""Attacks aimed at a class: which class, that it is reached, and that the wrapped attack is otherwise itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_toys import digits, system, trained_network

from casemate.attacks.aimed import Aimed, targets_of
from casemate.attacks.gap import GAP
from casemate.attacks.gradient import PGD
from casemate.attacks.spatial import StAdv
from casemate.errors import UserError
from casemate.evaluation.plan import bind_source, build_attack
from casemate.evaluation.schema import CellParams
from casemate.threat import ThreatModel, untargeted

LINF = ThreatModel("linf", 0.3)


def test_a_target_is_another_class_and_depends_on_the_label_and_the_draw_alone() -> None:
    labels = np.arange(1000)
    first, second = targets_of(labels, 1000, 0), targets_of(labels, 1000, 1)
    assert (first != labels).all() and first.min() >= 0 and first.max() < 1000 and (first != second).mean() > 0.9
    assert len(set(first.tolist())) > 500, "spread over the classes"
    assert targets_of(np.array([7, 3]), 1000, 0).tolist() == [first[7], first[3]]
    assert targets_of(np.array([0, 1]), 2, 5).tolist() == [1, 0]


def test_images_end_at_their_targets() -> None:
    x, y = (part[1500:1520] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    inner = PGD(steps=40)
    result = Aimed(inner, 0)(victim, x, untargeted(y), LINF)
    targets = torch.from_numpy(targets_of(y.numpy(), 10, 0))
    plain = inner(victim, x, untargeted(y), LINF)
    assert (result.prediction == targets).float().mean() > 0.8
    assert (plain.prediction == targets).float().mean() < 0.5
    assert torch.equal(result.success, result.prediction != y), "success stays that of the ledger: the label is lost"


def test_what_was_fitted_without_a_class_is_not_aimed() -> None:
    class Blind(PGD):
        aimable = False

    with pytest.raises(UserError, match="Blind was fitted without a class to aim at"):
        Aimed(Blind(), 0)


def test_it_is_the_attack_it_wraps() -> None:
    one = Aimed(StAdv(), 3)
    assert str(one.budget(LINF)) == str(StAdv().budget(LINF)) and one.parameters()["target"] == 3
    assert one.parameters() != Aimed(StAdv(), 4).parameters()
    view = system(trained_network(), (1, 8, 8), 10).views()["adaptive"]
    assert one.passes(view, 4) == StAdv().passes(view, 4)
    made = build_attack("a", CellParams(attack="pgd", target=2), 1.0, bind_source(None))
    assert isinstance(made, Aimed) and made.draw == 2
    assert isinstance(build_attack("a", CellParams(attack="pgd"), 1.0, bind_source(None)), PGD)
    with pytest.raises(UserError, match="GAP needs its weights before it can be aimed"):
        Aimed(GAP(), 0)
