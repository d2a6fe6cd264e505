"""The `study` section of params.yaml, the pictures of single images; the stage runs in test_pipeline_engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import images, linear
from PIL import Image

from casemate.attacks.aimed import targets_of
from casemate.attacks.gradient import FGSM
from casemate.errors import UserError
from casemate.evaluation.attacked import Attacked
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.plan import Runner, bind_source
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.study_cells import oracle_clean, studied
from casemate.params import check_params
from casemate.reporting.study_file import load_study
from casemate.reporting.study_pictures import sheet_rows, sheets, strips
from casemate.threat import ThreatModel
from pipeline import dag, profile, study

BALL = ThreatModel("linf", 0.3)
CELLS = {"fgsm": {"attack": "fgsm"}, "aimed": {"attack": "fgsm", "target": 0}}


def section(**study: Any) -> Any:
    return check_params(profile.resolved("mnist") | {"study": study}).study


# --- params.yaml ----------------------------------------------------------------------------------------------------


def test_it_is_off_by_default() -> None:
    assert section().models == [] and check_params(profile.resolved("quick")).study.models == []


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({"models": ["standart"]}, "study.models: no 'standart' there; did you mean 'standard'"),
        ({"models": ["standard"], "suites": ["cores"]}, "study.suites: no 'cores' there; did you mean 'core'"),
        ({"models": ["standard"], "oracle": "x"}, "study.oracle: no 'x' there"),
        ({"models": ["standard"], "strips": ["fgsn"]}, "study.strips: no 'fgsn' there; did you mean 'fgsm'"),
        ({"transfer": {"sources": ["x"]}}, "study.transfer.sources: no 'x' there"),
        (
            {"transfer": {"sources": ["atld"], "victims": ["atdl"]}},
            "study.transfer.victims: no 'atdl' there; did you mean 'atld'",
        ),
        (
            {"transfer": {"sources": ["atld", "trades"], "ensembles": {"atld": ["atld", "trades"]}}},
            "study.transfer.ensembles: atld is the name of a row, too",
        ),
        (
            {"transfer": {"sources": ["atld", "trades"], "ensembles": {"two": ["atld"]}}},
            "study.transfer: ensembles.two: name two different rows or more",
        ),
        (
            {"transfer": {"sources": ["atld"], "ensembles": {"two": ["atld", "atdl"]}}},
            "study.transfer: ensembles.two: 'atdl' is none of the sources; did you mean 'atld'",
        ),
        ({"ablations": {"tau": {"cells": {0.1: "pgd"}}}}, "study.ablations.tau.cells: no 'pgd' there"),
        ({"ablations": {"beta": {"rows": {1: "iwdd"}}}}, "study.ablations.beta.rows: no 'iwdd' there"),
        ({"ablations": {"tau": {}}}, "study.ablations.tau: an ablation is over cells or over rows"),
        ({"ablations": {"tau": {"cells": {-1: "fgsm"}}}}, "greater than or equal to 0"),
    ],
)
def test_mistakes_are_named(study: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        section(**study)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_it_needs_images() -> None:
    content = profile.resolved("mnist")
    content["evaluate"] = content["evaluate"] | {"subset": 0}
    with pytest.raises(UserError, match=r"it needs adversarial images, and evaluate.subset keeps none"):
        check_params(content | {"study": {"models": ["standard"]}})


# --- from the ledger ------------------------------------------------------------------------------------------------


def test_every_cell_comes_with_its_images_targets_and_the_oracles_word(tmp_path: Path) -> None:
    net = linear()
    data = images(net)
    params = EvaluateParams(subset=4, suites={"core": {"images": 6, "attacks": CELLS}})  # type: ignore[dict-item]
    runner = Runner(Ledger(tmp_path, 2), data, BALL, keep=params.subset)
    asked: dict[str, Any] = {"budget": 1.0, "bind": bind_source(None)}
    found = list(studied("net", net, runner, params, [], oracle=net, **asked))
    assert [f.case.attack for f in found] == ["fgsm", "aimed"] and found[0].about()["budget"] == "linf 0.3"
    plain, aimed = found
    assert len(plain.indices) == 4 and set(plain.indices.tolist()) == set(runner.order(4)), "of 6, 4 images were kept"
    assert plain.case.targets is None and aimed.case.targets is not None
    assert aimed.case.targets.tolist() == targets_of(aimed.case.labels, net.num_classes, 0).tolist()
    assert plain.case.oracle is not None and plain.case.oracle.tolist() == plain.case.draws[:, 0].tolist()
    for f in found:
        x, y = data.take(f.indices.tolist())
        assert np.array_equal(f.case.x_clean, x.numpy()) and np.array_equal(f.case.labels, y.numpy())  # type: ignore[arg-type]
    assert oracle_clean(net, found, runner)["n"] == 4
    assert not list(studied("net", net, runner, params, ["other"], **asked))
    again = Runner(Ledger(tmp_path, 2), data, BALL, keep=params.subset).ledger.read(
        net, data, FGSM(), BALL, "adaptive", runner.order(6)
    )
    assert len(again) == 6, "what was missing is in the ledger now"


# --- pictures -------------------------------------------------------------------------------------------------------


def case(attack: str, found: list[int], indices: list[int], **more: Any) -> tuple[Attacked, np.ndarray]:
    n = len(indices)
    x = np.full((n, 3, 16, 16), 0.5, np.float32) * (1 + np.array(indices)[:, None, None, None] / 10)
    labels = np.zeros(n, np.int64)
    clean = np.array([int(i == 3) for i in indices])  # number 3 is wrong from the start
    made = Attacked("A net", attack, labels, clean, np.array(found), x_clean=x, x_adv=x * 0.9, **more)
    return made, np.array(indices)


def test_a_sheet_shows_the_images_that_all_attacks_have() -> None:
    rows = sheet_rows([case("one", [1, 0, 1, 1], [1, 2, 3, 5]), case("a-long-attack-name", [0, 1, 1], [2, 3, 5])], 9)
    assert [[text for _, text in row] for row in rows] == [
        ["label 0", "one 0", "a-long-atta. 0"], ["label 0", "one 1*", "a-long-atta. 1*"],
    ]  # fmt: skip
    assert rows[1][0][0].max() == pytest.approx(0.75) and len(sheet_rows([case("one", [1, 1], [1, 2])], 1)) == 1
    assert sheet_rows([], 3) == []


def test_files_are_small_and_named_after_model_and_attack(tmp_path: Path) -> None:
    found = [case("iwda", [0, 1], [1, 2]), case("none", [0, 0], [1, 2])]
    aimed = case("to 1", [1, 0], [1, 2], targets=np.array([1, 1]))
    assert [p.name for p in strips(found, ["iwda", "none"], tmp_path)] == ["strip-a-net-iwda.jpg"]
    assert [p.name for p in sheets([*found, aimed], 2, tmp_path)] == ["sheet-a-net.jpg", "targets-a-net.jpg"]
    assert Image.open(tmp_path / "strip-a-net-iwda.jpg").size == (3 * 16 + 2 * 4, 3 * 16 + 2 * 4)
    assert Image.open(tmp_path / "sheet-a-net.jpg").size == (3 * 100, 2 * 114)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "sheet-a-net.jpg", "strip-a-net-iwda.jpg", "targets-a-net.jpg",
    ]  # fmt: skip


# --- the stage ------------------------------------------------------------------------------------------------------


def test_the_report_waits_for_the_study() -> None:
    stages = dag.load(".")
    assert "study" in stages["report"].upstream and "evaluate@standard" in stages["study"].upstream
    assert "train@at_pgd" in stages["study"].upstream  # the oracle is a row that need not be evaluated


def test_off_it_writes_an_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study.run(check_params(profile.resolved("quick")), argparse.Namespace())
    assert [p.name for p in (tmp_path / "reports/quick/study").iterdir()] == ["index.json"]
    assert load_study(tmp_path / "reports/quick") is None and load_study(tmp_path) is None
