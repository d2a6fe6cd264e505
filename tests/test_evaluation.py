"""A row evaluated from its parameters to its report, on small systems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from attack_toys import trained_network
from evaluation_toys import BALL, images, linear
from pydantic import ValidationError
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost
from casemate.attacks.gap import GAP
from casemate.attacks.gradient import FGSM, MIM, PGD
from casemate.data import Loaded
from casemate.data.base import Images
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet, evaluation_order
from casemate.evaluation.ledger import Ledger, Shard
from casemate.evaluation.plan import bind_source, blind, duration, not_evaluated, scaled
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About, Candidate, RowEvaluation, evaluate_row, fill_ledger
from casemate.fields import spec
from casemate.purification.imt_attacks import PublishedATLD
from casemate.reporting.inputs import Evaluation
from casemate.system import Offer, Purification, System, TorchSystem, View, identity_backward
from casemate.threat import Goal, ThreatModel, untargeted

ABOUT = About("smoke", "row", "standard", "digits", "digits_cnn", tuple("0123456789"), {"effective_epochs": 2.0})
SUITES: dict[str, Any] = {
    "core": {"attacks": {"pgd": {"attack": "pgd", "options": {"steps": 8}}}},
    "extended": {
        "images": 60,
        "attacks": {
            "fgsm": {"attack": "fgsm", "view": "adaptive"},
            "l2": {"attack": "pgd", "options": {"steps": 8}, "threat": {"norm": "l2", "radius": 1.0}},
        },
    },
}


def params(**changes: Any) -> EvaluateParams:
    given = {"chunk": 40, "subset": 40, "secondary_images": 50, "suites": SUITES, "gate": None}
    return EvaluateParams.model_validate({**given, **changes})


class Shift(Purification):
    """A purification that moves every pixel by a constant."""

    passes = (1, 1)
    spec: dict[str, Any] = {"shift": 0.02}  # noqa: RUF012
    modules: Sequence[nn.Module] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return (x + 0.02).clamp(0, 1).detach()

    def score(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))

    def views(self, classifier: Any) -> dict[str, View]:
        return {"adaptive": identity_backward(classifier, self)}


def plain() -> TorchSystem:
    return TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)


def purified() -> TorchSystem:
    return TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return EvaluationSet(Images(digits.test.images[:120], digits.test.labels[:120]))


def evaluate(
    root: Path, data: EvaluationSet, candidates: list[Candidate], given: EvaluateParams | None = None,
    said: list[str] | None = None, **options: Any,
) -> RowEvaluation:  # fmt: skip
    about = options.pop("about", ABOUT)
    given = given or params()
    say = (said if said is not None else []).append
    ledger = Ledger(root, given.chunk)
    return evaluate_row(about, candidates, data, ThreatModel("linf", 0.1), given, ledger, say=say, **options)


@pytest.fixture(scope="module")
def row(data: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> RowEvaluation:
    """A purifying system in full, with the classifier alone as a second mode."""
    candidates = [Candidate(purified(), "imt"), Candidate(plain(), "off", primary=False)]
    given = params(sweep={"attack": "pgd", "options": {"steps": 4}, "radii": [0, 0.05, 0.1], "images": 60})
    return evaluate(tmp_path_factory.mktemp("row"), data, candidates, given, seed=3)


def test_shards_fill_the_ledger_and_the_report_finds_it_all(data: EvaluationSet, tmp_path: Path) -> None:
    candidates = [Candidate(purified(), "imt"), Candidate(plain(), "off", primary=False)]
    given = params(sweep={"attack": "pgd", "options": {"steps": 4}, "radii": [0.05, 0.1], "images": 60})
    ledger, ball = Ledger(tmp_path / "shards", given.chunk), ThreatModel("linf", 0.1)
    for number in (1, 2):
        fill_ledger(ABOUT, candidates, data, ball, given, ledger, Shard(number, 2), seed=3, say=lambda _: None)
    said: list[str] = []
    report = evaluate(tmp_path / "shards", data, candidates, given, said, seed=3).report
    assert said[0] == "row: nothing to compute: the ledger has it all"
    assert report == evaluate(tmp_path / "alone", data, candidates, given, seed=3).report


# --- the report ---------------------------------------------------------------------------------------------


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


def test_the_report_is_what_the_report_stage_reads(row: RowEvaluation) -> None:
    read = Evaluation(**json.loads(json.dumps(row.report, allow_nan=False)))
    assert [s.name for s in read.systems] == ["row", "row+off"] and read.seed == 3 and not read.untrained
    assert read.systems[0].gate.verdict == "not run"
    everything = read.systems[0].worst_case("all", "adaptive")
    assert everything is not None and everything.n == 60


def test_an_attack_that_one_of_another_suite_outdoes_is_an_upper_bound(data: EvaluationSet, tmp_path: Path) -> None:
    weak = {"attack": "pgd", "options": {"steps": 1, "step_size": 1e-4, "random_start": False}}
    far = {"attack": "fgsm", "threat": {"norm": "linf", "radius": 0.01}}
    pgd = {"attack": "pgd", "options": {"steps": 20}}
    suites = {"core": {"attacks": {"pgd": pgd}}, "more": {"attacks": {"weak": weak, "far": far}}}
    row = evaluate_row(
        ABOUT, [Candidate(plain())], data, BALL, params(suites=suites), Ledger(tmp_path), say=lambda _: None
    )
    said = {cell["attack"]: cell["verdict"] for cell in row.report["systems"][0]["cells"]}
    assert said == {"pgd": "ok", "weak": "upper bound", "far": "ok"}  # another budget is no rival


def test_the_purifying_system_is_attacked_through_both_faces(row: RowEvaluation) -> None:
    first = row.report["systems"][0]
    assert first["changes_inference"] and first["clean"]["n"] == 120
    faces = [(c["suite"], c["attack"], c["view"], c["n"]) for c in first["cells"]]
    assert faces == [
        ("core", "pgd", "adaptive", 120), ("core", "pgd", "static", 120), ("extended", "fgsm", "adaptive", 60),
        ("extended", "l2", "adaptive", 60), ("extended", "l2", "static", 60),
    ]  # fmt: skip
    core = first["worst"]["core"]
    assert core["static"]["attacks"] == ["pgd"] and core["adaptive"]["attacks"] == ["pgd", "pgd (static)"]
    assert core["adaptive"]["accuracy"] <= min(c["accuracy"] for c in first["cells"][:2])
    assert first["worst"]["all"]["adaptive"]["n"] == 60
    passes = [c["forwards"] for c in first["cells"]]
    assert passes[0] > 2 and first["cells"][2]["forwards"] == 2 + 2  # a purified look is two passes; one verifies


def test_the_secondary_mode_has_one_face_and_fewer_images(row: RowEvaluation) -> None:
    second = row.report["systems"][1]
    assert (second["mode"], second["primary"], second["sweep"]) == ("off", False, None)
    assert [(c["view"], c["n"]) for c in second["cells"]] == [("adaptive", 50)] * 3
    assert second["clean"]["n"] == 50 and second["worst"]["core"]["static"] is None


def test_the_sweep_starts_from_the_clean_accuracy(row: RowEvaluation) -> None:
    sweep = row.report["systems"][0]["sweep"]
    assert sweep["radii"] == [0, 0.05, 0.1] and sweep["n"] == 60
    assert sweep["accuracy"][0] > sweep["accuracy"][1] >= sweep["accuracy"][2]
    assert all(low <= a <= high for low, a, high in zip(sweep["low"], sweep["accuracy"], sweep["high"], strict=True))


def test_a_cell_of_another_budget_does_not_make_the_worst_case_smaller(data: EvaluationSet, tmp_path: Path) -> None:
    suites = {
        **SUITES,
        "beyond": {"images": 20, "attacks": {"far": {"attack": "fgsm", "threat": {"norm": "l2", "radius": 1.0}}}},
    }
    system = evaluate(tmp_path, data, [Candidate(plain())], params(suites=suites)).report["systems"][0]
    everything = system["worst"]["all"]["adaptive"]
    assert everything["n"] == 60 and "beyond/far" not in everything["attacks"]
    assert "extended/l2" in everything["attacks"]  # as many images as the others: its rows inside the ball count
    assert system["worst"]["beyond"]["adaptive"]["n"] == 20


def test_a_worst_case_leaves_out_images_beyond_the_threat_model(row: RowEvaluation) -> None:
    """An l2 ball of radius 1 reaches far outside linf 0.1: alone, it fells images that the worst case keeps."""
    second = row.report["systems"][1]
    l2 = next(c for c in second["cells"] if c["attack"] == "l2")
    assert l2["threat"]["text"] == "l2 1" and l2["linf_max"] > 0.1
    assert l2["accuracy"] < second["worst"]["extended"]["adaptive"]["accuracy"]


def test_the_kept_images_are_the_worst_inside_the_threat_model(row: RowEvaluation, data: EvaluationSet) -> None:
    kept = row.adversarial
    x = torch.from_numpy(kept["x_clean"])
    x_adv = torch.from_numpy(kept["x_adv"])
    assert x_adv.shape == (40, 1, 8, 8) and kept["x_adv"].dtype == np.float32
    assert torch.equal(x, data.take(kept["indices"])[0])
    assert ThreatModel("linf", 0.1).contains(x_adv, x).all()
    assert np.array_equal(purified().decide(x_adv).numpy(), kept["prediction_adv"])
    assert np.array_equal(purified().decide(x).numpy(), kept["prediction_clean"])
    assert torch.equal(torch.from_numpy(kept["x_purified"]), Shift()(x_adv))
    fallen = {
        (r["index"], r["attack"])
        for r in row.rows.to_pylist()
        if r["system"] == "row" and r["success"] and r["suite"] in ("core", "extended") and r["linf"] <= 0.1 + 1e-6
    }
    down = {index for index, _ in fallen}
    wrong = kept["prediction_adv"] != kept["labels"]
    assert {int(i) for i in kept["indices"][wrong]} == down & {int(i) for i in kept["indices"]}
    assert all((int(i), a) in fallen for i, a in zip(kept["indices"][wrong], kept["attack"][wrong], strict=True))


def test_files_are_the_same_whoever_made_them(row: RowEvaluation, data: EvaluationSet, tmp_path: Path) -> None:
    again = evaluate(
        tmp_path / "ledger", data, [Candidate(purified(), "imt"), Candidate(plain(), "off", primary=False)],
        params(sweep={"attack": "pgd", "options": {"steps": 4}, "radii": [0, 0.05, 0.1], "images": 60}), seed=3,
    )  # fmt: skip
    assert again.report == row.report
    for name, result in (("a", row), ("b", again)):
        (tmp_path / name).mkdir()
        result.save(tmp_path / name)
    for file in ("ledger.parquet", "adversarial.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adversarial.npz", "ledger.parquet"]


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


# --- what runs ----------------------------------------------------------------------------------------------


def test_the_cost_is_told_first_and_is_an_upper_bound(data: EvaluationSet, tmp_path: Path) -> None:
    said: list[str] = []
    done = evaluate(tmp_path, data, [Candidate(plain())], said=said)
    assert said[0].startswith("row: 3 cells, 240 images to attack, at most 1.5k forwards")
    forwards = sum(int(r["forwards"]) for r in done.rows.to_pylist() if r["attack"] != "clean")
    assert forwards - 240 <= 120 * 8 + 60 + 60 * 8  # one verification each beside it
    said.clear()
    evaluate(tmp_path, data, [Candidate(plain())], said=said)
    assert said[0] == "row: nothing to compute: the ledger has it all"


def test_the_budget_scales_the_steps(data: EvaluationSet, tmp_path: Path) -> None:
    about = replace(ABOUT, budget=0.25)
    done = evaluate(tmp_path, data, [Candidate(plain())], about=about)
    cells = done.report["systems"][0]["cells"]
    assert [c["spec"].get("steps") for c in cells] == [2, None, 2] and done.report["budget"] == 0.25
    least = evaluate(tmp_path, data, [Candidate(plain())], about=replace(ABOUT, budget=0.01))
    assert least.report["systems"][0]["cells"][0]["spec"]["steps"] == 1


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


def test_a_system_with_one_face_has_no_published_worst_case(data: EvaluationSet, tmp_path: Path) -> None:
    entry = evaluate(tmp_path, data, [Candidate(plain())]).report["systems"][0]
    assert {c["protocol"] for c in entry["cells"]} == {"adaptive"}
    assert entry["worst"]["all"]["published"] is None


def test_the_report_names_the_floors_of_its_row(data: EvaluationSet, tmp_path: Path) -> None:
    floors = [
        {"rows": ["row", "other"], "suite": "core", "accuracy": 0.75},
        {"rows": ["other"], "suite": "core", "accuracy": 1},
    ]
    suites = {"core": {"images": 20, "attacks": {"fgsm": {"attack": "fgsm"}}}}
    given = params(models=["row", "other"], floors=floors, suites=suites)
    report = evaluate(tmp_path, data, [Candidate(plain())], given).report
    assert report["floors"] == [{"suite": "core", "accuracy": 0.75}]
    assert Evaluation.model_validate(report).floors[0].accuracy == 0.75
    bare = evaluate(tmp_path, data, [Candidate(plain())], params(suites=suites)).report
    assert "floors" not in bare and Evaluation.model_validate(bare).floors == ()


def test_a_short_card_is_untrained() -> None:
    assert replace(ABOUT, card={"effective_epochs": 0.5}).untrained
    assert not replace(ABOUT, card={"effective_epochs": 1.0}).untrained


def test_progress_is_told_per_cell(tmp_path: Path) -> None:
    system: System = linear()
    small = images(linear(), n=60)
    seen: list[tuple[str, int, int]] = []
    given = params(suites={"core": {"attacks": {"fgsm": {"attack": "fgsm"}}}}, chunk=25, subset=0)
    evaluate_row(
        ABOUT, [Candidate(system)], small, BALL, given, Ledger(tmp_path, 25), say=lambda _: None,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    assert seen == [("row core fgsm", 25, 60), ("row core fgsm", 50, 60), ("row core fgsm", 60, 60)]


def test_an_attack_that_must_be_bound_and_cannot_is_refused() -> None:
    with pytest.raises(UserError, match="attack 'gap' needs its weights"):
        bind_source(plain())("gap", GAP())


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": {"suite": "corr"}}, "selection: no suite 'corr'; did"),
        (
            {"models": ["at"], "floors": [{"rows": ["at"], "suite": "cor", "accuracy": 0.7}]},
            "floors: no suite 'cor'; did",
        ),
        (
            {"models": ["at"], "floors": [{"rows": ["at"], "suite": "core", "accuracy": 75}]},
            "less than or equal to 1",
        ),
        ({"suites": {"all": SUITES["core"]}}, "stands for the union"),
        ({"suites": {}}, "at least 1"),
        ({"suites": {"core": {"attacks": {"x": {"attack": "pdg"}}}}}, "unknown attack 'pdg'; did you mean 'pgd'"),
        ({"suites": {"core": {"attacks": {"x": {"attack": "pgd", "options": {"steps": 0}}}}}}, "steps"),
        ({"suites": {"core": {"attacks": {"x": {"attack": "pgd", "options": {"stepz": 1}}}}}}, "stepz"),
        ({"suites": {"core": {"attacks": {"x": {"attack": "transfer"}}}}}, "needs evaluate.source"),
        ({"sweep": {"attack": "pgd", "radii": [0.2, 0.1]}}, "radii must rise"),
        ({"procedures": "extend"}, "no suite 'extend'; did you mean 'extended'"),
        ({"chunk": 0}, "chunk"),
        ({"gate": {"step": 3}}, "step"),
    ],
)
def test_wrong_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        params(**changes)


def test_radii_may_be_fractions() -> None:
    given = params(sweep={"attack": "pgd", "radii": ["2/255", "8/255"]})
    assert given.sweep is not None and given.sweep.radii[1] == pytest.approx(8 / 255)
