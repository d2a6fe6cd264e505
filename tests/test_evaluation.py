"""A row evaluated from its parameters to its report, on small systems."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation_toys import BALL, images, linear
from row_toys import ABOUT, evaluate, params, plain, purified, toy_set, whole_row

from casemate.attacks.gap import GAP
from casemate.data import Loaded
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger, Shard
from casemate.evaluation.plan import bind_source, duration
from casemate.evaluation.suite import Candidate, RowEvaluation, evaluate_row, fill_ledger
from casemate.reporting.inputs import Evaluation
from casemate.system import System
from casemate.threat import ThreatModel


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return toy_set(digits)


@pytest.fixture(scope="module")
def row(data: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> RowEvaluation:
    return whole_row(tmp_path_factory.mktemp("row"), data)


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


def test_the_report_is_what_the_report_stage_reads(row: RowEvaluation) -> None:
    read = Evaluation(**json.loads(json.dumps(row.report, allow_nan=False)))
    assert [s.name for s in read.systems] == ["row", "row+off"] and read.seed == 3 and not read.untrained
    assert read.systems[0].gate.verdict == "not run"
    everything = read.systems[0].worst_case("all", "adaptive")
    assert everything is not None and everything.n == 60


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


def test_files_are_the_same_whoever_made_them(row: RowEvaluation, data: EvaluationSet, tmp_path: Path) -> None:
    again = whole_row(tmp_path / "ledger", data)
    assert again.report == row.report
    for name, result in (("a", row), ("b", again)):
        (tmp_path / name).mkdir()
        result.save(tmp_path / name)
    for file in ("ledger.parquet", "adversarial.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adversarial.npz", "ledger.parquet"]


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
