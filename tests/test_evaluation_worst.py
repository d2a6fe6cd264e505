"""The worst case of a row: which cells take part, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_toys import BALL
from row_toys import ABOUT, SUITES, Shift, evaluate, params, plain, purified, toy_set, whole_row

from casemate.data import Loaded
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.suite import Candidate, RowEvaluation, evaluate_row
from casemate.threat import ThreatModel


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return toy_set(digits)


@pytest.fixture(scope="module")
def row(data: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> RowEvaluation:
    return whole_row(tmp_path_factory.mktemp("row"), data)


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


def test_a_system_with_one_face_has_no_published_worst_case(data: EvaluationSet, tmp_path: Path) -> None:
    entry = evaluate(tmp_path, data, [Candidate(plain())]).report["systems"][0]
    assert {c["protocol"] for c in entry["cells"]} == {"adaptive"}
    assert entry["worst"]["all"]["published"] is None
