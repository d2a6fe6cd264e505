"""The masking gate: every check trips on a system made to trip it, and none on a sound one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import trained_network
from evaluation_toys import BALL, cell
from torch import Tensor, nn

from casemate.attacks.gradient import FGSM, PGD
from casemate.attacks.transfer import Transfer
from casemate.data import Loaded
from casemate.evaluation import gate, masking
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Cell, Ledger
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Planned, Runner
from casemate.evaluation.schema import GateParams
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel

GATE = GateParams(images=100, fewer_steps=5, steps=10, unbounded_steps=20, corners=20, restarts=3)
SMALL = ThreatModel("linf", 0.05)


def system(model: nn.Module) -> TorchSystem:
    return TorchSystem(model, input_shape=(1, 8, 8), num_classes=10)


def planned(name: str, attack: Any = None, view: str = "adaptive", threat: ThreatModel = BALL) -> Planned:
    return Planned(name, "core", name, attack or PGD(), threat, view, 100)


class Layer(nn.Module):
    """A network behind a function of images."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.before, self.network, self.after = before, trained_network(), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class Backwards(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def backwards(x: Tensor) -> Tensor:
    out: Tensor = Backwards.apply(x)  # type: ignore[no-untyped-call]
    return out


MADE: dict[str, Callable[[], nn.Module]] = {
    "sound": trained_network,
    "saturated": lambda: Layer(lambda x: x, lambda z: 1e4 * z),
    "misled": lambda: Layer(backwards),
    "quantised": lambda: Layer(lambda x: (x * 4).round() / 4),
}


@pytest.fixture(scope="module")
def verdict(digits: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    runner = Runner(Ledger(tmp_path_factory.mktemp("gate"), 100), EvaluationSet(digits.test), SMALL)
    return lambda kind: gate.run_gate(system(MADE[kind]()), runner, GATE, [], [])


def failed(report: dict[str, Any]) -> set[str]:
    return {check["name"] for check in report["checks"] if not check["passed"]}


# --- whole gate ---------------------------------------------------------------------------------------------


def test_a_sound_system_passes(verdict: Callable[[str], dict[str, Any]]) -> None:
    report = verdict("sound")
    assert report["verdict"] == "ok" and report["static"] == "not run" and not failed(report)
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names)) == 8
    assert all(any(c.isdigit() for c in check["detail"]) for check in report["checks"])


def test_saturated_logits_have_no_gradient(verdict: Callable[[str], dict[str, Any]]) -> None:
    report = verdict("saturated")
    assert report["verdict"] == "unreliable"
    assert {"gradients are not zero", "unbounded attack succeeds"} <= failed(report)


def test_a_quantised_input_has_no_gradient(verdict: Callable[[str], dict[str, Any]]) -> None:
    report = verdict("quantised")
    assert {"gradients are not zero", "unbounded attack succeeds"} <= failed(report)


def test_a_misled_attack_is_weaker_than_chance(verdict: Callable[[str], dict[str, Any]]) -> None:
    """Gradients point the wrong way: PGD makes nothing wrong, random corners do."""
    report = verdict("misled")
    assert {"unbounded attack succeeds", "random search finds nothing new"} <= failed(report)
    assert "gradients are not zero" not in failed(report)


# --- single checks, on hand-made cells ----------------------------------------------------------------------

NONE = [0] * 100


def down(n: int, **options: Any) -> Cell:
    """A hundred images, all right when clean, of which the first n fall."""
    return cell([1] * n + [0] * (100 - n), NONE, **options)


@pytest.mark.parametrize(("fgsm", "pgd", "passed"), [(20, 10, False), (10, 20, True), (12, 10, True)])
def test_one_step_must_not_beat_many(fgsm: int, pgd: int, passed: bool) -> None:
    check = masking.single_step(down(fgsm), down(pgd))
    assert check.passed is passed and f"FGSM leaves {100 - fgsm}.0 %, PGD {100 - pgd}.0 %" in check.detail


def test_more_steps_must_not_weaken() -> None:
    assert not masking.more_steps(down(30), down(20), GATE).passed
    assert masking.more_steps(down(20), down(20), GATE).passed


def test_accuracy_must_not_rise_with_the_radius() -> None:
    rising = [(0.1, down(10)), (0.2, down(40)), (0.3, down(25)), (0.4, down(60))]
    check = masking.more_radius(rising)
    assert not check.passed and "60.0 % is left at radius 0.2, 75.0 % at 0.3" in check.detail
    assert masking.more_radius([(0.1, down(10)), (0.2, down(10)), (0.3, down(90))]).passed


@pytest.mark.parametrize(("left", "passed"), [(0, True), (1, False), (30, False)])
def test_the_unbounded_attack_leaves_less_than_one_in_a_hundred(left: int, passed: bool) -> None:
    assert masking.unbounded(down(100 - left)).passed is passed


@pytest.mark.parametrize(
    ("once", "often", "passed"), [(50, 60, False), (50, 53, True), (50, 50, True), (0, 9, False)]
)
def test_restarts_must_change_little(once: int, often: int, passed: bool) -> None:
    check = masking.more_restarts(down(once), down(often), GateParams(restarts=10))
    assert check.passed is passed and check.concerns == "attack" and f"10 leave {100 - often}.0 %" in check.detail


def test_losses_must_agree() -> None:
    check = masking.loss_choice({"ce": down(40), "margin": down(41), "dlr": down(60)})
    assert not check.passed and "40.0 % by dlr" in check.detail
    assert masking.loss_choice({"ce": down(60), "margin": down(10), "dlr": down(20)}).passed
    assert masking.loss_choice({"ce": down(40), "margin": down(42)}).passed


def test_two_classes_have_no_dlr() -> None:
    for classes, names in ((2, {"loss_ce", "loss_margin"}), (3, {"loss_ce", "loss_margin", "loss_dlr"})):
        cells = gate.gate_cells(GATE, BALL, 100, classes, swept=True)
        assert {cell.name for cell in cells if "loss" in cell.name} == names
    bare = GATE.model_copy(update={"restarts": 1, "losses": False})
    assert {cell.name for cell in gate.gate_cells(bare, BALL, 100, 10, swept=True)} == {
        "fgsm", "fewer", "pgd", "unbounded", "corners",
    }  # fmt: skip


def test_black_box_must_not_beat_white_box() -> None:
    transfer = Transfer().with_source(system(trained_network()))
    weak, strong = Finished(planned("pgd"), down(20)), Finished(planned("mim"), down(25))
    for fallen, passed in ((40, False), (25, True), (10, True)):
        black = Finished(planned("transfer", transfer), down(fallen))
        (check,) = masking.black_above_white_box([weak, strong, black], BALL)
        assert check.passed is passed and "mim 75.0 %" in check.detail
    assert masking.black_above_white_box([weak, strong], BALL) == []


def test_an_attack_must_not_raise_accuracy() -> None:
    errors = [0] * 60 + [1] * 40
    cured = Finished(planned("fgsm"), cell(NONE, errors, cured=range(60, 90)))
    (check,) = masking.above_clean([cured])
    assert not check.passed and "90.0 % right under attack, 60.0 % clean" in check.detail
    (check,) = masking.above_clean([Finished(planned("fgsm"), cell(NONE, errors))])
    assert check.passed
    static = Finished(planned("fgsm", view="static"), cell(NONE, errors, cured=range(60, 90)))
    assert [c.concerns for c in masking.above_clean([static])] == ["static"]


class Purified(TorchSystem):
    """Says that it changes its inference."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), input_shape=(1, 8, 8), num_classes=10)
        self.changes_inference = True


@pytest.mark.parametrize(("static", "adaptive", "passed"), [(10, 50, False), (10, 11, True), (50, 10, True)])
def test_static_far_above_adaptive_discredits_the_static_column(static: int, adaptive: int, passed: bool) -> None:
    suites = [
        Finished(planned("pgd", view="static"), down(static)), Finished(planned("pgd"), down(adaptive)),
        Finished(planned("only_adaptive"), down(90)),
    ]  # fmt: skip
    (check,) = masking.static_above_adaptive(Purified(), suites)
    assert check.passed is passed and check.concerns == "static"
    assert f"{100 - static}.0 %" in check.detail and f"{100 - adaptive}.0 %" in check.detail
    assert masking.static_above_adaptive(system(nn.Flatten()), suites) == []


def test_static_attacks_are_no_better_for_being_many() -> None:
    """Three blind attacks fell different images, so that together they leave next to nothing; each of them alone,
    which is what a paper shows, leaves two thirds."""
    suites = []
    for at, name in enumerate(("pgd", "mim", "cw")):
        third = cell([int(34 * at <= i < 34 * (at + 1)) for i in range(100)], NONE)
        suites += [Finished(planned(name, view="static"), third), Finished(planned(name), down(99))]
    suites.append(Finished(planned("small"), cell([1] * 3, [0] * 3)))
    suites.append(Finished(planned("small", view="static"), cell([1] * 3, [0] * 3)))
    (check,) = masking.static_above_adaptive(Purified(), suites)
    assert not check.passed and check.concerns == "static"
    assert check.detail.startswith("pgd: static 66.0 % left, adaptive 1.0 % of 100 images")
    assert "an illusion in 3 of 4 attacks" in check.detail
    (check,) = masking.static_above_adaptive(Purified(), suites[-2:])
    assert check.passed and "no illusion in any of 1 attacks" in check.detail


@pytest.mark.parametrize(("whole", "passed"), [(40, False), (60, True), (63, True)])
def test_inference_must_not_leave_more_than_its_classifier(whole: int, passed: bool) -> None:
    """Of 100 images 60 fall without what inference adds, in the union of two attacks; images that one side has not
    finished are left out."""
    halves = [cell([i < 40 for i in range(100)], NONE), cell([30 <= i < 60 for i in range(100)], NONE)]
    bare = [Finished(planned(name), half) for name, half in zip(("pgd", "cw"), halves, strict=True)]
    mine = [Finished(planned("pgd"), down(whole)), Finished(planned("pgd", view="static"), down(10))]
    (check,) = masking.above_own_classifier(mine, bare, BALL)
    assert check.passed is passed and check.concerns == "system"
    assert check.detail.startswith(f"the worst case leaves {100 - whole}.0 %, and 40.0 % of the classifier alone")
    assert ("raise the budgets" in check.detail) is not passed
    few = Finished(planned("few"), cell([0] * 3, [0] * 3))
    (check,) = masking.above_own_classifier([*mine, few], bare, BALL)
    assert check.passed and "of 3 images" in check.detail
    assert masking.above_own_classifier(mine, [], BALL) == []


def test_random_search_is_allowed_a_little_luck() -> None:
    corners = cell([0] * 90 + [1] * 10, NONE)
    assert not masking.random_search(corners, [down(50)], BALL).passed
    assert masking.random_search(corners, [down(92)], BALL).passed is False
    assert masking.random_search(corners, [down(98)], BALL).passed
    elsewhere = cell([1], [0], indices=[400])
    assert not masking.random_search(corners, [down(50), elsewhere], BALL).passed


def test_an_attack_that_another_beats_is_an_upper_bound() -> None:
    other_ball = planned("l2", threat=ThreatModel("l2", 1.0))
    cells = [
        Finished(planned("fgsm", FGSM()), down(10)), Finished(planned("pgd"), down(40)),
        Finished(planned("mim"), down(38)), Finished(other_ball, down(1)),
    ]  # fmt: skip
    assert gate.verdicts(cells) == ["upper bound", "ok", "ok", "ok"]


def test_a_static_failure_is_not_the_systems(tmp_path: Path, digits: Loaded) -> None:
    """The whole gate on a system whose purification undoes nothing, with a static column that says otherwise."""

    class Twofold(TorchSystem):
        def views(self) -> dict[str, View]:
            both = super().views()
            return {**both, "static": View("static", self.classifier, False, self.offers)}

    twofold = Twofold(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    twofold.changes_inference = True
    suites = [
        Finished(planned("pgd", view="static", threat=SMALL), down(10, linf=0.05)),
        Finished(planned("pgd", threat=SMALL), down(50, linf=0.05)),
    ]
    runner = Runner(Ledger(tmp_path, 100), EvaluationSet(digits.test), SMALL)
    report = gate.run_gate(twofold, runner, GATE, suites, [])
    assert (report["verdict"], report["static"]) == ("ok", "unreliable")
