"""Attacks outside lp balls in an evaluation: each cell has its own budget, the worst case only what its ball has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attack_toys import trained_network
from evaluation_toys import BALL, cell

from casemate.attacks.gradient import PGD
from casemate.attacks.rotation import RotationTranslation
from casemate.attacks.spatial import ADef, StAdv
from casemate.data import Loaded
from casemate.data.base import Images
from casemate.evaluation import gate, masking
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Planned
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About, Candidate, RowEvaluation, evaluate_row
from casemate.reporting import words
from casemate.reporting.heatmap import heat_map
from casemate.reporting.inputs import Evaluation, ReportInputs, Row
from casemate.reporting.leaderboard import build, strongest
from casemate.system import TorchSystem
from casemate.threat import ThreatModel

SMALL = ThreatModel("linf", 0.03)
ATTACKS: dict[str, Any] = {
    "pgd": {"attack": "pgd", "options": {"steps": 5}},
    "adef": {"attack": "adef", "options": {"steps": 20, "candidates": 3}},
    "flow": {"attack": "stadv", "options": {"steps": 10, "rate": 0.05, "max_displacement": 1.5}},
    "turn": {"attack": "rotation_translation", "options": {"shift": 1, "angles": 3, "shifts": 3}},
}


@pytest.fixture(scope="module")
def row(digits: Loaded, tmp_path_factory: pytest.TempPathFactory) -> RowEvaluation:
    data = EvaluationSet(Images(digits.test.images[:60], digits.test.labels[:60]))
    params = EvaluateParams.model_validate(
        {"chunk": 40, "subset": 40, "suites": {"core": {"attacks": ATTACKS}}, "gate": None}
    )
    system = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    about = About("smoke", "row", "standard", "digits", "digits_cnn", tuple("0123456789"), {"effective_epochs": 2.0})
    ledger = Ledger(tmp_path_factory.mktemp("budgets"), 40)
    return evaluate_row(about, [Candidate(system)], data, SMALL, params, ledger, say=lambda _: None)


def cells(row: RowEvaluation) -> dict[str, Any]:
    return {c["attack"]: c for c in row.report["systems"][0]["cells"]}


def test_each_cell_names_its_own_budget(row: RowEvaluation) -> None:
    found = {name: c["threat"] for name, c in cells(row).items()}
    assert found == {
        "pgd": {"norm": "linf", "radius": 0.03, "text": "linf 0.03"},
        "adef": {"norm": "flow", "radius": None, "text": "deformation"},
        "flow": {"norm": "flow", "radius": 1.5, "text": "flow tau 0.05, at most 1.5 px"},
        "turn": {"norm": "rotation", "radius": 30, "text": "rotation 30 deg, shift 1 px"},
    }
    labels = {(r["attack"], r["threat"]) for r in row.rows.to_pylist()}
    assert ("adef", "deformation") in labels and ("pgd", "linf 0.03") in labels


def test_a_worst_case_has_the_images_inside_the_ball_only(row: RowEvaluation) -> None:
    found, worst = cells(row), row.report["systems"][0]["worst"]["all"]["adaptive"]
    down, inside = set(), set()
    for r in row.rows.to_pylist():
        if r["clean_prediction"] != r["label"] or (r["success"] and r["linf"] <= SMALL.radius + 1e-6):
            down.add(r["index"])
        if r["attack"] in ("adef", "flow", "turn") and r["linf"] <= SMALL.radius + 1e-6:
            inside.add(r["index"])
    assert worst["accuracy"] == pytest.approx(1 - len(down) / 60)
    assert found["adef"]["accuracy"] < 0.2 < worst["accuracy"] <= found["pgd"]["accuracy"]
    assert found["turn"]["accuracy"] < worst["accuracy"]


def test_the_kept_images_are_inside_the_ball(row: RowEvaluation) -> None:
    import torch

    x, x_adv = torch.from_numpy(row.adversarial["x_clean"]), torch.from_numpy(row.adversarial["x_adv"])
    assert SMALL.contains(x_adv, x).all()


def test_a_cell_is_beaten_only_by_one_of_the_same_budget(row: RowEvaluation) -> None:
    assert {c["verdict"] for c in cells(row).values()} == {"ok"}  # adef leaves far less than pgd
    weak, strong = cell([0] * 100, [0] * 100), cell([1] * 100, [0] * 100)

    def under(attack: Any, found: Any, name: str = "x") -> Finished:
        return Finished(Planned(name, "core", name, attack, BALL, "adaptive", 100), found)

    said = gate.verdicts([under(PGD(), weak), under(ADef(), strong), under(StAdv(), weak), under(StAdv(), strong)])
    assert said == ["ok", "ok", "upper bound", "ok"]
    assert gate.verdicts([under(PGD(), weak), under(PGD(steps=3), strong)]) == ["upper bound", "ok"]


def test_a_black_box_outside_the_ball_does_not_discredit_gradients() -> None:
    weak, strong = cell([0] * 100, [0] * 100), cell([1] * 100, [0] * 100, linf=0.9)
    far = Finished(Planned("turn", "core", "turn", RotationTranslation(), BALL, "adaptive", 100), strong)
    flow = Finished(Planned("flow", "core", "flow", StAdv(), BALL, "adaptive", 100), strong)
    white = Finished(Planned("pgd", "core", "pgd", PGD(), BALL, "adaptive", 100), weak)
    assert masking.black_above_white_box([far, flow, white], BALL) == []


def test_the_report_reads_and_shows_the_budgets(row: RowEvaluation) -> None:
    read = Evaluation(**json.loads(json.dumps(row.report, allow_nan=False)))
    inputs = ReportInputs("smoke", (Row(read),))
    board = build(inputs)
    lines = {line.attack: line.threat for line in heat_map(inputs, board.entries).lines}
    assert (
        lines["pgd"] is None and lines["adef"] == "deformation" and lines["flow"] == "flow tau 0.05, at most 1.5 px"
    )
    hardest = strongest(read, read.systems[0])
    assert hardest is not None and hardest.attack == "pgd"
    assert words.threat("flow tau 0.05") == "flow tau 0.05" and words.threat("linf 0.03") == "ℓ∞ radius 0.03"


def test_the_page_names_the_budget_beside_the_attack(row: RowEvaluation, tmp_path: Path) -> None:
    from casemate.reporting.page import write_report

    read = Evaluation(**json.loads(json.dumps(row.report, allow_nan=False)))
    page = write_report(ReportInputs("smoke", (Row(read),)), tmp_path).read_text()
    assert "rotation 30 deg, shift 1 px" in page and "flow tau 0.05, at most 1.5 px" in page
    assert "flow radius" not in page and "rotation radius" not in page


def test_the_command_line_names_it_too(
    row: RowEvaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from casemate.cli import _show

    monkeypatch.setenv("COLUMNS", "200")
    _show({**row.report, "cautions": []})
    shown = " ".join(capsys.readouterr().out.split())
    assert "adef, deformation" in shown and "pgd, linf" not in shown
