"""Detection figures on tables made by hand, and the protocol of the ER paper from end to end."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import digits, system, trained_network
from sklearn.metrics import roc_auc_score
from torch import Tensor

from casemate.attacks.carlini_wagner import CWL2
from casemate.attacks.gradient import FGSM, PGD
from casemate.attacks.joint import Joint
from casemate.detectors.fitting import Regression
from casemate.detectors.kd import KD
from casemate.detectors.lid import LID
from casemate.errors import UserError
from casemate.evaluation.detection import Judged, auroc, figures, mean_and_deviation, tpr_at_fpr
from casemate.evaluation.detection_protocol import Protocol, crafted, noisy, run_protocol, split
from casemate.fields import spec
from casemate.threat import ThreatModel

LINF = ThreatModel("linf", 0.2)


def test_figures_of_a_table_made_by_hand() -> None:
    """Ten adversarial: 6 flagged, 1 accepted and right, 3 accepted and wrong. Five natural: 1 flagged, 3 right."""
    adversarial = Judged(np.array([2.0] * 6 + [-1.0] * 4), np.array([True] * 2 + [False] * 4 + [True] + [False] * 3))
    natural = Judged(np.array([1.0, -2.0, -2.0, -2.0, -2.0]), np.array([True, True, True, True, False]))
    made = figures(natural, adversarial, 0.0)
    assert made["acc_adv"] == pytest.approx(0.6) and made["acc_nadv"] == pytest.approx(0.8)
    assert made["acc_cla"] == pytest.approx(1 / 4) and made["acc_com"] == pytest.approx(0.7)
    assert made["system_natural"] == pytest.approx(3 / 5)
    # Of 50 pairs, the six above 1 win five each, the four at -1 win the four naturals at -2.
    assert made["auroc"] == pytest.approx((6 * 5 + 4 * 4) / 50)
    assert made["tpr_at_5_fpr"] == pytest.approx(0.6)
    assert (made["n_adversarial"], made["n_natural"]) == (10, 5)


def test_when_all_are_detected_there_is_no_accuracy_of_the_rest() -> None:
    everything = Judged(np.ones(4), np.zeros(4, dtype=bool))
    made = figures(everything, everything, 0.0)
    assert made["acc_cla"] is None and made["acc_com"] == 1.0
    assert made["acc_nadv"] == 0.0 and made["system_natural"] == 0.0 and made["auroc"] == 0.5
    with pytest.raises(UserError, match="one of them is missing"):
        figures(everything, Judged(np.ones(0), np.ones(0, dtype=bool)), 0.0)


def test_combined_accuracy_is_at_least_the_detection_rate() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        draw = [Judged(rng.normal(size=30).round(1), rng.random(30) < 0.5) for _ in range(2)]
        made = figures(*draw, float(rng.normal()))
        assert made["acc_com"] >= made["acc_adv"]
        left = 30 - round(30 * made["acc_adv"])
        through = round((made["acc_cla"] or 0) * left)
        assert made["acc_com"] == pytest.approx(made["acc_adv"] + through / 30)


def test_auroc_is_scikit_learns_ties_included() -> None:
    rng = np.random.default_rng(0)
    natural, adversarial = rng.normal(size=50).round(1), (rng.normal(size=70) + 0.5).round(1)
    target = [0] * 50 + [1] * 70
    assert auroc(natural, adversarial) == pytest.approx(roc_auc_score(target, np.concatenate([natural, adversarial])))


def test_the_true_positive_rate_at_five_percent() -> None:
    natural = np.arange(100.0)
    assert tpr_at_fpr(natural, np.array([94.0, 94.5, 200.0, 0.0]), 0.05) == 0.5
    assert tpr_at_fpr(natural[:10], np.array([9.0, 9.5]), 0.05) == 0.5  # no false alarm is allowed among ten


def test_repetitions() -> None:
    rows = [{"a": 1.0, "b": None, "n_x": 3}, {"a": 3.0, "b": 2.0, "n_x": 3}]
    assert mean_and_deviation(rows) == {"a": 2.0, "a_sd": pytest.approx(2**0.5), "b": 2.0, "b_sd": None, "n_x": 3}
    assert mean_and_deviation(rows[:1]) == {"a": 1.0, "b": None, "n_x": 3}


def test_sets_are_disjoint_whole_and_seeded() -> None:
    first, second = split(50, 0.2, 0)
    assert len(first) == 10 and sorted(torch.cat([first, second]).tolist()) == list(range(50))
    assert torch.equal(split(50, 0.2, 0)[0], first) and not torch.equal(split(50, 0.2, 1)[0], first)
    with pytest.raises(UserError, match="leaves one of the two sets empty"):
        split(2, 0.2, 0)


def test_minimum_norm_attacks_are_kept_in_the_bound() -> None:
    x, y = digits()
    x, y = x[1500:1520], y[1500:1520]
    victim, threat = system(trained_network(), (1, 8, 8), 10), ThreatModel("l2", 0.3)
    free = CWL2(steps=60, rate=0.2, rounds=2, first_weight=1.0)(victim, x, goal_of(y), threat).x_adv
    assert float((free - x).flatten(1).norm(dim=1).max()) > 0.3
    kept = crafted(victim, CWL2(steps=60, rate=0.2, rounds=2, first_weight=1.0), threat, x, y, seed=0)
    assert bool(threat.contains(kept, x).all())


def goal_of(y: torch.Tensor) -> Any:
    from casemate.threat import untargeted

    return untargeted(y)


def test_noise_has_the_norm_of_the_perturbation() -> None:
    x = torch.full((4, 1, 8, 8), 0.5)
    x_adv = x + 0.01 * torch.arange(4.0).view(4, 1, 1, 1)
    found = noisy(x, x_adv, seed=0)
    torch.testing.assert_close((found - x).flatten(1).norm(dim=1), (x_adv - x).flatten(1).norm(dim=1))


def protocol_table(**changes: Any) -> dict[str, Any]:
    x, y = digits()
    y = changes.pop("labels", y)
    attacks: Any = {"fgsm": (FGSM(), LINF), "pgd": (PGD(steps=10, keep="last"), LINF)}
    attacks = changes.pop("attacks", attacks)
    detectors = {"kd": KD(), "kd_half": KD(threshold="half"), "lid": LID(), "lid_batch": LID(reference="batch")}
    detectors = changes.pop("detectors", detectors)
    protocol = Protocol(**{"splits": 2, "adaptive": Joint(steps=10, rounds=3), "adaptive_images": 30, **changes})
    return run_protocol(
        trained_network(), detectors, attacks, (x[:1000], y[:1000]), (x[1000:1400], y[1000:1400]), protocol
    )


def test_the_protocol() -> None:
    table = protocol_table()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert (table["set_1"], table["set_2"], table["splits"]) == (80, 320, 2)
    assert [row["attack"] for row in table["attacks"]] == ["fgsm", "pgd"]
    assert all(row["accuracy"] < row["clean"] for row in table["attacks"])
    rows = table["rows"]
    keys = [(r["detector"], r["fitted_on"], r["tested_on"], r["threshold"], r["scope"]) for r in rows]
    # Three detectors have two thresholds and one has one, at 2 x 2 attacks and two scopes.
    assert len(keys) == len(set(keys)) == (3 * 2 + 1) * 4 * 2
    for row in rows:
        assert row["familiar"] == (row["fitted_on"] == row["tested_on"])
        assert row["acc_com"] >= row["acc_adv"]
        assert row["n_natural"] == 320
        if row["scope"] == "successes":
            assert row["acc_cla"] in (None, 0.0) and row["n_adversarial"] < 320
    own = [r for r in rows if r["detector"] == "kd" and r["familiar"] and r["scope"] == "all"]
    assert all(r["auroc"] > 0.6 and "auroc_sd" in r for r in own)
    strict = [r for r in own if r["threshold"] == "validation"]
    assert all(r["acc_nadv"] > 0.85 for r in strict)
    # The joint attack is run on what can be deployed, and gets further than the blind one.
    assert {row["detector"] for row in table["adaptive"]} == {"kd", "kd_half", "lid"}
    for row in table["adaptive"]:
        assert row["n"] == 30 and row["accuracy"] <= 1 - row["evaded"] + 1e-6
    blind = next(r for r in strict if r["tested_on"] == "pgd")
    joint = next(r for r in table["adaptive"] if r["detector"] == "kd" and r["fitted_on"] == "pgd")
    assert joint["accuracy"] < blind["acc_com"]


def test_a_clean_error_is_no_image_that_the_whole_system_kept() -> None:
    class Harmless(Joint):
        def __call__(self, system: Any, x: Tensor, *rest: Any, **more: Any) -> Any:
            return SimpleNamespace(success=torch.zeros(len(x), dtype=torch.bool), prediction=system.decide(x))

    table = protocol_table(splits=1, adaptive=Harmless(), adaptive_images=320)
    assert all(row["evaded"] == 0 and 0.8 < row["accuracy"] == row["natural"] < 1 for row in table["adaptive"])


@spec
class Paranoid(KD):
    """Flags everything."""

    def regress(self, natural: Tensor, adversarial: Tensor) -> Regression:
        fit = KD.regress(self, natural, adversarial)
        fit.threshold.fill_(-1e9)
        return fit


def test_a_system_that_rejects_everything_keeps_nothing() -> None:
    table = protocol_table(splits=1, adaptive=Joint(steps=2, rounds=1), detectors={"all": Paranoid()})
    (own, *_) = (row for row in table["rows"] if row["own"] and row["scope"] == "all")
    assert own["acc_com"] == 1 and own["system_natural"] == 0
    assert all(row["rejected"] == 1 and row["natural"] == row["accuracy"] == 0 for row in table["adaptive"])


def test_what_an_attack_leaves_as_it_was_is_no_adversarial_image() -> None:
    """FGSM and C&W give clean errors back untouched: counted as adversarial, they would be naturals to be flagged."""
    x, y = digits()
    wrong = y.clone()
    wrong[1000:1400:4] = (wrong[1000:1400:4] + 1) % 10
    alone = system(trained_network(), (1, 8, 8), 10)
    errors = int((alone.decide(x[1000:1400]) != wrong[1000:1400]).sum())
    table = protocol_table(splits=1, adaptive=None, detectors={"kd": KD(threshold="half")}, labels=wrong)
    rows = {(r["tested_on"], r["scope"]): r for r in table["rows"] if r["familiar"]}
    assert errors > 90 and rows["pgd", "all"]["n_adversarial"] == 320  # which goes on from an error
    untouched = 320 - rows["fgsm", "all"]["n_adversarial"]
    assert 0.15 * 320 < untouched < 0.4 * 320
    for attack in ("fgsm", "pgd"):
        assert rows[attack, "successes"]["n_adversarial"] <= 320 - untouched
    with pytest.raises(UserError, match="attack fgsm changed none of the 80 images"):
        protocol_table(labels=(alone.decide(x) + 1) % 10, detectors={"kd": KD()})


def test_the_protocol_repeats_and_its_seed_matters() -> None:
    small: dict[str, Any] = {"splits": 1, "adaptive": None}
    one, again, other = (protocol_table(**small, **seed) for seed in ({}, {}, {"seed": 1}))
    assert one == again and one["rows"] != other["rows"] and one["adaptive"] == []
    assert not any(key.endswith("_sd") for row in one["rows"] for key in row)
