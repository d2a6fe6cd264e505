"""The `detect` section of params.yaml, and its stage on the `smoke` profile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import digits, system, trained_network

from casemate.attacks.gradient import FGSM
from casemate.deploy import card as cards
from casemate.detectors.density import KernelDensity
from casemate.detectors.kd import KD
from casemate.detectors.lid import LID
from casemate.errors import UserError
from casemate.evaluation.detection_protocol import deployable, load_detector, run_protocol, save_detector
from casemate.params import Params, check_params, load_params
from casemate.threat import ThreatModel
from casemate.tracking import detection_metrics
from casemate.training.artifact import load_system
from pipeline import dag, detect, export_detectors, profile
from tests.project import Project

KERNEL = {"detectors": {"kd": {"method": "kd"}}}


def section(name: str = "mnist", **detected: Any) -> Params:
    return check_params(profile.resolved(name) | {"detect": detected})


# --- params.yaml ----------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_linf_attacks_at_the_profiles_threat_model() -> None:
    params = section(standard=KERNEL)
    wanted = params.detect["standard"]
    assert (wanted.images, wanted.share, wanted.splits, wanted.fitted_to) == (1000, 0.2, 1, "fgsm")
    made = detect.attacks_of(params, wanted)
    assert {name: str(threat) for name, (_, threat) in made.items()} == {"fgsm": "linf 0.3", "pgd": "linf 0.3"}
    pgd: Any = made["pgd"][0]
    assert (pgd.steps, pgd.size(made["pgd"][1]), pgd.keep) == (40, pytest.approx(0.01), "last")
    assert check_params(profile.resolved("mnist")).detect == {}


def test_an_attack_may_have_a_threat_model_of_its_own_and_the_budget_scales_it() -> None:
    attacks = {"cw": {"attack": "cw_l2", "options": {"steps": 50}, "threat": {"norm": "l2", "radius": 2}}}
    params = section("smoke", standard={**KERNEL, "attacks": attacks, "adaptive": {"options": {"steps": 20}}})
    attack, threat = detect.attacks_of(params, params.detect["standard"])["cw"]
    assert str(threat) == "l2 2" and getattr(attack, "steps", 0) == 10  # budget 0.2
    protocol = detect.protocol_of(params, params.detect["standard"])
    assert (protocol.adaptive.steps, protocol.adaptive_images) == (4, 100)
    nothing = section(standard={**KERNEL, "adaptive": None, "share": 0.5, "splits": 3})
    found = detect.protocol_of(nothing, nothing.detect["standard"])
    assert (found.adaptive, found.share, found.splits) == (None, 0.5, 3)


@pytest.mark.parametrize(
    ("detected", "expected"),
    [
        ({"standrd": KERNEL}, "detect: no row 'standrd' .*did you mean 'standard'"),
        ({"standard": {"detectors": {"kd": {"method": "kde"}}}}, "detectors.kd: unknown detector 'kde'.*'kd'"),
        ({"standard": {"detectors": {}}}, "detect.standard.detectors: .*at least 1"),
        (
            {"standard": {"detectors": {"er": {"method": "er", "options": {"bandwith": 1}}}}},
            "detectors.er.options.bandwith: unknown key; did you mean 'bandwidth'",
        ),
        ({"standard": {**KERNEL, "imags": 5}}, "detect.standard.imags: unknown key; did you mean 'images'"),
        ({"standard": {**KERNEL, "share": 1}}, "detect.standard.share: .*less than 1"),
        ({"standard": {**KERNEL, "fit_to": "pdg"}}, "detect.standard: fit_to: no attack 'pdg'; did you mean 'pgd'"),
        ({"standard": {**KERNEL, "attacks": {"a": {"attack": "transfer"}}}}, "attacks.a: transfer needs a source"),
        ({"standard": {**KERNEL, "attacks": {"a": {"attack": "gap"}}}}, "attacks.a: gap needs a source or fitted"),
        ({"standard": {**KERNEL, "attacks": {"a": {"attack": "joint"}}}}, "attacks.a: the attack on a detector is"),
        (
            {"standard": {**KERNEL, "adaptive": {"options": {"step": 1}}}},
            "detect.standard.adaptive.options.step: unknown key; did you mean 'steps'",
        ),
    ],
)
def test_mistakes_are_one_line(detected: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as told:
        section(**detected)
    assert "\n" not in str(told.value)


def test_a_name_of_several_kinds_gets_the_hint_of_its_own() -> None:
    """`gap` is an attack and what is fitted for it."""
    content = profile.resolved("mnist")
    content["finetune"]["generators"]["gap"]["options"] = {"widht": 8}
    with pytest.raises(UserError, match=r"gap.options.widht: unknown key; did you mean 'width'"):
        check_params(content)


# --- what is stored -------------------------------------------------------------------------------------------


def test_stored_detectors_are_fitted_to_validation_images(tmp_path: Path) -> None:
    x, y = digits()
    network, train, validation = trained_network(), (x[:900], y[:900]), (x[900:1000], y[900:1000])
    specs = {"kd": KD(), "lid": LID(reference="batch")}
    said: list[tuple[str, int, int]] = []
    attack = (FGSM(), ThreatModel("linf", 0.2))
    made = deployable(network, specs, attack, train, validation, 0, lambda *at: said.append(at))
    assert set(made) == {"kd"}  # the other needs the clean originals
    flagged = made["kd"].readout(validation[0])[0] > 0
    assert 0 < int(flagged.sum()) <= 5  # the threshold is that of 5 % of these very images
    assert ("validation images", 0, 100) in said and ("detector kd on validation images", 0, 2) in said
    save_detector(tmp_path / "kd", "kd", made["kd"], row="standard")
    again = load_detector(tmp_path / "kd", network)
    assert torch.equal(again.readout(x[1000:1100])[0], made["kd"].readout(x[1000:1100])[0])


def test_the_metrics_of_a_run_and_its_progress() -> None:
    x, y = digits()
    attacks: Any = {name: (FGSM(), ThreatModel("linf", r)) for name, r in {"weak": 0.1, "strong": 0.3}.items()}
    said: list[tuple[str, int, int]] = []
    table = run_protocol(
        trained_network(), {"kd": KD()}, attacks, (x[:500], y[:500]), (x[1000:1600], y[1000:1600]), None,
        lambda *at: said.append(at),
    )  # fmt: skip
    assert said == [
        ("attack weak", 0, 600), ("attack weak", 500, 600), ("attack strong", 0, 600), ("attack strong", 500, 600),
        ("detector kd", 0, 2), ("detector kd", 1, 2),
    ]  # fmt: skip
    table["adaptive"] = [{"detector": "kd", "fitted_on": "weak", "threat": "linf 0.1", "accuracy": 0.25}]
    metrics = detection_metrics(table)
    assert len(metrics) == 4 * 6 + 1 and metrics["kd/weak/joint linf 0.1"] == 0.25
    (own,) = [r for r in table["rows"] if r["own"] and r["scope"] == "all" and not r["familiar"] and
              r["fitted_on"] == "weak"]  # fmt: skip
    assert own["threshold"] == "validation" and metrics["kd/weak/strong/acc_com"] == own["acc_com"]


# --- the stage ------------------------------------------------------------------------------------------------


def test_a_row_that_changes_its_inference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = system(trained_network(), (1, 8, 8), 10)
    monkeypatch.setattr("casemate.training.artifact.load_system", lambda folder, device: found)
    monkeypatch.setattr("casemate.training.artifact.load_artifact", lambda folder: ({}, {"defense": "card"}))
    params = section(standard=KERNEL)
    assert detect.victim(params, "standard", "cpu") == (found.classifier, {"defense": "card"})
    found.changes_inference = True
    with pytest.raises(UserError, match=r"detect.standard: .* plain classifier, and standard changes its inference"):
        detect.victim(params, "standard", "cpu")


def test_the_report_waits_for_the_list_of_rows_that_have_detectors() -> None:
    """params.yaml names none, and the folder that the report depends on is made all the same."""
    stages = dag.load(".")
    assert not any(name.startswith("detect@") for name in stages)
    assert stages["detect_index"].upstream == [] and "detect_index" in stages["report"].upstream


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("detect"), "smoke")
    project.dvc("repro", "detect@standard", "detect_index")
    yield project


@pytest.mark.slow
def test_the_stage_judges_stores_and_records(smoke: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smoke.folder)
    assert smoke.json("reports/smoke/detect/index.json") == ["standard"]
    report = smoke.json("reports/smoke/detect/standard.json")
    assert (report["set_1"], report["set_2"], report["budget"]) == (40, 160, 0.2)
    assert report["stored"] == {"fitted_on": "fgsm", "natural": 150, "detectors": ["kd"]}
    assert {(r["detector"], r["fitted_on"], r["tested_on"]) for r in report["rows"]} == {("kd", "fgsm", "fgsm")}
    assert [(r["n"], r["threat"]) for r in report["adaptive"]] == [(50, "linf 0.2")]
    loaded: Any = load_system(Path("models/smoke/trained/standard"))
    stored = load_detector(Path("models/smoke/detectors/standard/kd"), loaded.classifier)
    assert stored.spec["detector"] == "casemate.detectors.kd:KD"
    card = json.loads(Path("models/smoke/detectors/standard/kd/card.json").read_text())
    assert (card["row"], card["fitted_on"], card["natural"]) == ("standard", "fgsm", 150)
    assert "detect@standard" in smoke.python("-m", "pipeline", "runs", "find",
                                             "reports/smoke/detect/standard.json").stdout  # fmt: skip
    assert "detectors" not in smoke.run("git", "status", "--porcelain", "--untracked-files=all").stdout


@pytest.mark.slow
def test_the_stage_depends_on_what_it_reads(smoke: Project) -> None:
    code = (
        "from pipeline import dag; stages = dag.load(); print(stages['detect@standard'].upstream, "
        "{'detect@standard', 'detect_index'} <= set(stages['report'].upstream))"
    )
    stages = smoke.python("-c", code).stdout
    assert stages.strip() == "['download', 'pretrain@standard'] True"
    assert "didn't change, skipping" in smoke.dvc("repro", "detect@standard").stdout


@pytest.mark.slow
def test_a_detectors_file_goes_through_the_gate_and_has_its_card(smoke: Project) -> None:
    smoke.dvc("repro", "export_detectors@standard")
    (entry,) = smoke.json("reports/smoke/export_detectors/standard.json")["files"]
    folder = smoke.folder / "models/smoke/exported_detectors/standard/kd"
    card = cards.verify(folder)
    assert (entry["file"], entry["gate"]) == ("kd/model.onnx", card.gate is not None and card.gate.passed)
    assert card.form == "detector" and "detector" in card.outputs and card.provenance.mode == "kd"
    assert card.gate is not None and card.gate.table is not None and card.gate.table.attacks == ("joint",)
    assert card.clean is not None and card.gate.served.accuracy <= card.clean.accuracy == entry["clean"]["accuracy"]
    assert card.gate.served.n == card.gate.table.n == 30 and card.robust == {}
    text = (folder / "MODEL_CARD.md").read_text()
    assert "with a detector beside it" in text and "no robust accuracy" not in text
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b" ")
    with pytest.raises(UserError, match="was changed or exchanged"):
        cards.verify(folder)


@pytest.mark.slow
def test_a_detector_that_no_file_holds_is_left_out_and_said(
    smoke: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(smoke.folder)
    monkeypatch.setattr(KernelDensity, "exportable", False)
    report = export_detectors.export_all(load_params(Path("params.yaml")), "standard", tmp_path)
    assert report["files"] == [] and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "standard kd: its score is a search, which no file holds: not exported\n"
