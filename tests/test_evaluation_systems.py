"""Systems that offer more or less than a classifier: what is run on them, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from attack_toys import trained_network
from row_toys import ABOUT, SUITES, Shift, evaluate, params, plain, purified, toy_set
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.gradient import FGSM, MIM, PGD
from casemate.data import Loaded
from casemate.data.base import Images
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet, evaluation_order
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.plan import blind, not_evaluated, scaled
from casemate.evaluation.suite import Candidate, evaluate_row
from casemate.fields import spec
from casemate.purification.imt_attacks import PublishedATLD
from casemate.system import Offer, TorchSystem, View
from casemate.threat import Goal, ThreatModel


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return toy_set(digits)


class Veil(Shift):
    """Gives attacks no slope to climb."""

    spec: dict[str, Any] = {"veil": True}  # noqa: RUF012

    def views(self, classifier: Any) -> dict[str, View]:
        logits = lambda x: classifier(self(x)) + 0 * x.sum()  # noqa: E731
        return {"adaptive": View("adaptive", logits, True, self.offers, (2, 2))}


def test_a_purification_that_hides_its_gradient_is_found_out_by_its_classifier(
    data: EvaluationSet, tmp_path: Path
) -> None:
    gate = {"images": 60, "steps": 4, "fewer_steps": 2, "unbounded_steps": 4, "restarts": 1, "losses": False,
            "corners": 0, "curvature": 0}  # fmt: skip
    veiled = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Veil())
    pgd = {"attack": "pgd", "options": {"steps": 8}, "view": "adaptive"}
    given, name = params(gate=gate, suites={"core": {"attacks": {"pgd": pgd}}}), "inference adds nothing unexplained"
    for whole, passed in ((veiled, False), (purified(), True)):
        candidates = [Candidate(whole, "imt"), Candidate(plain(), "off", primary=False)]
        first, other = evaluate(tmp_path, data, candidates, given).report["systems"]
        (check,) = (c for c in first["gate"]["checks"] if c["name"] == name)
        assert check["passed"] is passed and "of 50 images" in check["detail"]
        assert passed or first["gate"]["verdict"] == "unreliable"
        assert other["gate"] == {"verdict": "not run", "static": "not run", "checks": []}
    alone = evaluate(tmp_path, data, candidates[:1], given).report["systems"][0]
    assert name not in [c["name"] for c in alone["gate"]["checks"]]


class Shy(TorchSystem):
    """Changes its inference and shows no adaptive face."""

    def views(self) -> dict[str, View]:
        return {"static": super().views()["static"]}


def test_without_an_adaptive_view_there_is_no_number(data: EvaluationSet, tmp_path: Path) -> None:
    shy = Shy(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())
    given = params(gate={}, sweep={"attack": "pgd", "radii": [0.1]})
    entry = evaluate(tmp_path, data, [Candidate(shy)], given).report["systems"][0]
    assert entry["cells"] == [] and entry["sweep"] is None and entry["gate"]["verdict"] == "not run"
    assert entry["worst"] == {"all": {"adaptive": None, "static": None, "published": None}}
    assert "not evaluated" in entry["not_evaluated"] and entry["clean"]["n"] == 120


class Alias(Shy):
    """Calls its static face adaptive."""

    def views(self) -> dict[str, View]:
        return {name: TorchSystem.views(self)["static"] for name in ("static", "adaptive")}


class Armoured(Alias):
    """The same, but it ships a procedure that accounts for the purification."""

    def adaptive_attacks(self) -> dict[str, Any]:
        return {"own": PGD(steps=3), "theirs": Weak()}


def made(kind: type[TorchSystem]) -> TorchSystem:
    return kind(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())


def test_a_face_that_is_adaptive_in_name_only_is_no_adaptive_face(data: EvaluationSet, tmp_path: Path) -> None:
    assert blind(made(Shy)) and blind(made(Alias)) and blind(made(Armoured))
    assert not blind(purified()) and not blind(plain())
    assert "not evaluated" in str(not_evaluated(made(Alias)))
    given = params(gate={}, sweep={"attack": "pgd", "radii": [0.1]})
    entry = evaluate(tmp_path, data, [Candidate(made(Armoured))], given).report["systems"][0]
    # No plain attack meets the purification there, whatever it asks for: all are static, and no gate can judge.
    assert {(c["attack"], c["view"]) for c in entry["cells"]} == {
        ("pgd", "static"), ("fgsm", "static"), ("l2", "static"), ("own", "adaptive"), ("theirs", "adaptive"),
    }  # fmt: skip
    assert entry["gate"]["verdict"] == "not run" and entry["sweep"] is None and "not_evaluated" not in entry


class Noisy(TorchSystem):
    """Needs averaging over draws."""

    stochastic = True


def test_a_stochastic_system_is_not_evaluated_either(data: EvaluationSet, tmp_path: Path) -> None:
    said: list[str] = []
    noisy = Noisy(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    entry = evaluate(tmp_path, data, [Candidate(noisy)], said=said).report["systems"][0]
    assert (
        entry["cells"] == [] and "answers with noise" in entry["not_evaluated"] and "answers with noise" in said[-1]
    )


class Mute(TorchSystem):
    """Shows its scores only."""

    def __init__(self) -> None:
        super().__init__(trained_network(), input_shape=(1, 8, 8), num_classes=10)
        self.offers = frozenset({"scores", "labels"})


def test_what_a_system_does_not_offer_is_left_out_and_said(data: EvaluationSet, tmp_path: Path) -> None:
    said: list[str] = []
    suites = {"core": {"attacks": {**SUITES["core"]["attacks"], "transfer": {"attack": "transfer"}}}}
    given = params(suites=suites, source="other", gate={})
    entry = evaluate(tmp_path, data, [Candidate(Mute())], given, said, source=plain()).report["systems"][0]
    assert [c["attack"] for c in entry["cells"]] == ["transfer", "corners"]
    assert "row: pgd is left out: it needs gradient; this model offers labels and scores" in said
    assert entry["gate"]["verdict"] == "not run" and entry["worst"]["core"]["adaptive"]["accuracy"] < 0.9


@spec
class Weak(Attack):
    """A paper's own attack: it does nothing to what is right, and puts right what is wrong. White box in name."""

    published: ClassVar[bool] = True

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return PGD(steps=10, objective="margin").run(
            replace(view, exact=False), x, Goal((goal.labels + 1) % 10, goal.labels), threat, seed, cost
        )

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 10 * n, 10 * n, n


class Armed(TorchSystem):
    """Ships procedures of its own."""

    def adaptive_attacks(self) -> dict[str, Any]:
        return {"own": MIM(steps=8), "theirs": Weak()}


def armed() -> TorchSystem:
    made = Armed(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())
    return made


def test_a_systems_own_attacks_run_in_the_suite_of_fewest_images(data: EvaluationSet, tmp_path: Path) -> None:
    entry = evaluate(tmp_path, data, [Candidate(armed())]).report["systems"][0]
    own = [c for c in entry["cells"] if c["attack"] in ("own", "theirs")]
    assert [(c["suite"], c["attack"], c["method"], c["view"], c["n"]) for c in own] == [
        ("extended", "own", "MIM", "adaptive", 60), ("extended", "theirs", "Weak", "adaptive", 60),
    ]  # fmt: skip
    worst = entry["worst"]
    assert worst["core"]["adaptive"]["n"] == 120 and "core/own" not in worst["all"]["adaptive"]["attacks"]
    assert "extended/own" in worst["all"]["adaptive"]["attacks"]


def test_the_suite_of_a_systems_own_attacks_may_be_named(data: EvaluationSet, tmp_path: Path) -> None:
    entry = evaluate(tmp_path, data, [Candidate(armed())], params(procedures="core")).report["systems"][0]
    assert {c["suite"] for c in entry["cells"] if c["attack"] == "own"} == {"core"}


def test_a_procedure_that_does_not_know_the_norm_stops_the_row_before_anything_runs(
    data: EvaluationSet, tmp_path: Path
) -> None:
    class Stubborn(Armed):
        def adaptive_attacks(self) -> dict[str, Any]:
            return {"theirs": PublishedATLD()}  # works in linf

    made = Stubborn(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())
    ledger = Ledger(tmp_path, 40)
    with pytest.raises(UserError, match="PublishedATLD works in linf, not in l2"):
        evaluate_row(ABOUT, [Candidate(made)], data, ThreatModel("l2", 1.0), params(), ledger, say=lambda _: None)
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_budget_scales_a_systems_own_attacks_and_not_a_papers() -> None:
    assert scaled(MIM(steps=8), 0.25) == MIM(steps=2) and scaled(MIM(steps=8), 0.01) == MIM(steps=1)
    assert scaled(FGSM(), 0.25) == FGSM() and scaled(Weak(), 0.25) == Weak()
    published = PublishedATLD()
    assert scaled(published, 0.25) is published


def test_the_papers_protocol_is_told_apart_and_left_out_of_nothing(data: EvaluationSet, tmp_path: Path) -> None:
    """What a paper reports (static attacks, its own "adaptive" ones) stands beside what the worst case leaves."""
    given = params(gate={"images": 60, "corners": 5, "steps": 4, "fewer_steps": 2, "unbounded_steps": 5})
    second = armed().logits(data.take(range(120))[0]).topk(2).indices[:, 1].numpy()
    labels = np.where(np.arange(120) % 3 == 0, second, data.images.labels)  # clean errors, close to being right
    odd = EvaluationSet(Images(data.images.images, labels))
    entry = evaluate(tmp_path, odd, [Candidate(armed())], given).report["systems"][0]
    protocol = {(c["suite"], c["attack"], c["view"]): c["protocol"] for c in entry["cells"]}
    assert {key for key, value in protocol.items() if value == "published"} == {
        ("core", "pgd", "static"), ("extended", "l2", "static"), ("extended", "theirs", "adaptive"),
    }  # fmt: skip
    every = entry["worst"]["all"]
    assert every["published"]["attacks"] == ["core/pgd (static)", "extended/l2 (static)", "extended/theirs"]
    assert set(every["published"]["attacks"]) < set(every["adaptive"]["attacks"])
    assert every["static"]["attacks"] == ["core/pgd", "extended/l2"]
    assert every["adaptive"]["accuracy"] <= every["published"]["accuracy"] <= every["static"]["accuracy"]
    # A published attack above clean accuracy discredits the published figures, not the system's.
    above = {c["name"]: c for c in entry["gate"]["checks"] if c["name"].startswith("no attack above clean")}
    static, adaptive = above["no attack above clean (static)"], above["no attack above clean (adaptive)"]
    assert static["detail"].startswith("theirs: ") and static["concerns"] == "static" and not static["passed"]
    assert adaptive["passed"] and "theirs" not in adaptive["detail"]
    assert entry["gate"]["static"] == "unreliable"
    json.dumps(entry, allow_nan=False)


class Banded(Shift):
    """Acts otherwise where the mean grey lies in a band, or would."""

    spec: dict[str, Any] = {"band": [0.3, 0.32]}  # noqa: RUF012
    offers: frozenset[Offer] = frozenset({"purification", "band"})

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)


def test_a_purification_with_a_band_says_how_many_clean_images_are_in_it(data: EvaluationSet, tmp_path: Path) -> None:
    suites = {"core": {"images": 60, "attacks": {"fgsm": {"attack": "fgsm"}}}}
    made = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Banded())
    entry = evaluate(tmp_path, data, [Candidate(made)], params(suites=suites)).report["systems"][0]
    order = evaluation_order(120)[:60]
    grey = data.images.images[order].mean((1, 2, 3)) / 255
    inside = int(((grey > 0.3) & (grey < 0.32)).sum())
    assert 0 < inside < 60 and entry["band"] == {
        "low": 0.3, "high": 0.32, "inside": inside, "n": 60,
        "lowest": pytest.approx(grey.min(), abs=1e-5), "highest": pytest.approx(grey.max(), abs=1e-5),
    }  # fmt: skip
    other = evaluate(tmp_path, data, [Candidate(purified())], params(suites=suites)).report["systems"][0]
    assert "band" not in other
