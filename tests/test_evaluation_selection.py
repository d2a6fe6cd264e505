"""What chooses a champion: a suite on validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_toys import BALL
from row_toys import ABOUT, params, plain, purified, toy_set

from casemate.attacks.gradient import PGD
from casemate.data import Loaded
from casemate.data.base import Images
from casemate.evaluation.images import EvaluationSet, evaluation_order
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.suite import Candidate, evaluate_row
from casemate.reporting.inputs import Evaluation
from casemate.threat import untargeted


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return toy_set(digits)


def test_a_champion_is_chosen_on_held_out_images(data: EvaluationSet, tmp_path: Path) -> None:
    """One suite, on images that are no test images, with the settings of the test; nothing else sees them."""
    held = EvaluationSet(Images(data.images.images[::-1][:70].copy(), data.images.labels[::-1][:70].copy()))
    given = params(selection={"images": 50})
    ledger, said = Ledger(tmp_path / "ledger", 40), []
    made = [Candidate(purified(), "imt"), Candidate(plain(), "off", primary=False)]
    shared: Any = {"held_out": held, "say": said.append}
    row = evaluate_row(ABOUT, made, data, BALL, given, ledger, **shared)
    systems = Evaluation.model_validate(row.report).systems
    chosen = [s.selection for s in systems if s.selection is not None]
    assert [(c.suite, c.n) for c in chosen] == [("core", 50)] * 2 and not any(c.incomplete for c in chosen)
    assert set(chosen[0].attacks) == {"core/pgd", "core/pgd (static)"}
    victim = plain()
    x, y = held.take(evaluation_order(70)[:50])
    left = PGD(steps=8)(victim, x, untargeted(y), BALL, seed=0)  # another seed than the ledger's
    assert abs(chosen[1].accuracy - float((~left.success).float().mean())) < 0.15
    bare = evaluate_row(ABOUT, made, data, BALL, given, ledger, say=said.append).report
    for one, other in zip(row.report["systems"], bare["systems"], strict=True):
        assert one.pop("selection") and one == other
    off = evaluate_row(ABOUT, made, data, BALL, params(selection=None), ledger, **shared).report
    assert all("selection" not in one for one in off["systems"])
