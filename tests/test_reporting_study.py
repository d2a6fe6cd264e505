"""The report's section on the study: its table, its medians, its links; and nothing where the study is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_reporting_samples import rows, write_profile
from test_study import LABELS, case

from casemate.errors import UserError
from casemate.evaluation.study import LP, study
from casemate.reporting import ReportInputs, write_report
from casemate.reporting.study_file import load_study, load_transfer


def write_study(reports: Path) -> None:
    folder = reports / "study"
    folder.mkdir(parents=True, exist_ok=True)
    distances = {**LP, "iwd near": LP["mean_abs"], "iwd far": LP["linf"]}
    about = {"protocol": "digits", "distances_of": 9, "oracle": {"row": "judge", "n": 6, "accuracy": 0.5}}
    cases = [case(moved=0.1, oracle=LABELS), case(LABELS, attack="failed<b>", moved=0.3)]
    study(cases, distances, about=about).save(folder / "study.json")
    files = ["sheet-net.jpg", "study.json"]
    (folder / "index.json").write_text(json.dumps({"schema": 1, "models": ["net"], "files": files}))


def test_the_section_has_rates_distances_and_links(tmp_path: Path) -> None:
    write_profile(tmp_path, rows())
    reports = tmp_path / "reports/mnist"
    write_study(reports)
    names = [row["row"] for row in rows()]
    inputs = ReportInputs.load("mnist", reports, tmp_path / "models/mnist", names)
    assert inputs.study is not None and inputs.study.pictures == ["sheet-net.jpg"]
    assert inputs.study.median("net", "a", "linf") == pytest.approx(0.14, abs=1e-4)
    assert inputs.study.median("net", "a", "iwd") == pytest.approx(0.14, abs=1e-4), "the mean over both windows"
    assert inputs.study.median("net", "failed<b>", "iwd") is None and inputs.study.median("no", "a", "l2") is None
    page = write_report(inputs, reports).read_text()
    section = page[page.index('<section id="study">') :]
    section = section[: section.index("</section>")]
    assert "60.0" in section and "failed&lt;b&gt;" in section and 'href="study/sheet-net.jpg"' in section
    assert "judge" in section and "50.0% of 6 clean images" in section and '<a href="#study">' in page


def test_a_transfer_matrix_has_a_section_of_its_own(tmp_path: Path) -> None:
    def figures(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 40}

    write_profile(tmp_path, rows())
    reports, names = tmp_path / "reports/mnist", [row["row"] for row in rows()]
    (reports / "study").mkdir()
    assert load_transfer(reports) is None
    content = {
        "threat": "linf 0.3", "steps": 20, "cells": {"a<b>": {"a<b>": figures(0.125), "net": figures(0.75)}},
        "clean": {"a<b>": figures(0.9), "net": figures(0.95)}, "ensembles": {"a<b>": ["net", "c<d>"]},
    }  # fmt: skip
    (reports / "study/transfer.json").write_text(json.dumps(content))
    page = write_report(ReportInputs.load("mnist", reports, tmp_path / "models/mnist", names), reports).read_text()
    section = page[page.index('<section id="transfer">') :].split("</section>")[0]
    assert "<b>12.5</b>" in section and "75.0" in section and "95.0" in section and "PGD-20" in section
    assert "mean of net, c&lt;d&gt;" in section.replace("<wbr>", "")
    assert "a<b>" not in section and '<a href="#transfer">' in page and 'id="study"' not in page
    (reports / "study/transfer.json").write_text('{"threat": "linf 0.3"}')
    with pytest.raises(UserError, match=r"transfer.json: steps: Field required"):
        load_transfer(reports)


def test_off_there_is_no_section_and_a_broken_file_is_named(tmp_path: Path) -> None:
    assert load_study(tmp_path) is None
    (tmp_path / "study").mkdir()
    (tmp_path / "study/index.json").write_text('{"schema": 1, "models": [], "files": []}')
    assert load_study(tmp_path) is None
    (tmp_path / "study/index.json").write_text('{"schema": 1, "models": ["net"], "files": []}')
    with pytest.raises(UserError, match=r"study.json does not exist: run the stage"):
        load_study(tmp_path)
    (tmp_path / "study/study.json").write_text('{"about": {}}')
    with pytest.raises(UserError, match=r"study.json: table: Field required"):
        load_study(tmp_path)
