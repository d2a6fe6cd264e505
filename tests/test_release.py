"""The release gate: a file is attacked as it is served, and what is worse than the evaluation says does not pass."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor

from casemate.data import Loaded
from casemate.deploy.card import Gate
from casemate.deploy.export import ExportOptions, export_system
from casemate.deploy.metadata import About
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.parity import Labelled, parity_report
from casemate.deploy.release import Table, judge, judge_by_source, make_card, read_table
from casemate.deploy.served import Fallen, Search, attack_file, crafted, reachable
from casemate.errors import UserError
from casemate.evaluation import robustness
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About as AboutRow
from casemate.evaluation.suite import Candidate, evaluate_row
from casemate.system import TorchSystem
from casemate.threat import ThreatModel
from tests.deploy_toys import ABOUT, fitted_system

THREAT = ThreatModel("linf", 0.1)
SEARCH = Search(queries=60, steps=10)
N = 80


@pytest.fixture(scope="module")
def system(digits: Loaded) -> TorchSystem:
    return fitted_system(digits)


@pytest.fixture(scope="module")
def plain(system: TorchSystem) -> TorchSystem:
    return TorchSystem(system.classifier, input_shape=(1, 8, 8), num_classes=10, name="row")


@pytest.fixture(scope="module")
def data(digits: Loaded) -> EvaluationSet:
    return EvaluationSet(digits[2])


@pytest.fixture(scope="module")
def images(data: EvaluationSet) -> tuple[Tensor, Tensor]:
    return data.take(range(N))


@pytest.fixture(scope="module")
def path(plain: TorchSystem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("release") / "plain.onnx"
    export_system(plain, made, ABOUT)
    return made


@pytest.fixture(scope="module")
def found(path: Path, plain: TorchSystem, images: tuple[Tensor, Tensor]) -> Fallen:
    return attack_file(OnnxSystem(path, "cpu"), *images, THREAT, SEARCH, source=plain)


def broken(path: Path, out: Path) -> Path:
    """The file with a head that answers the next class."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tuple(tensor.dims)[:1] == (10,):
            tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, 0), tensor.name))
    onnx.save(model, out)
    return out


def test_every_attack_meets_what_stood_before_it(found: Fallen) -> None:
    assert list(found.attacks) == ["transfer of apgd", "square", "rays"]
    standing = ~found.clean
    for fell in found.attacks.values():
        assert not (fell & ~standing).any()
        standing &= ~fell
    assert (found.all == ~standing).all()
    report = found.report()
    assert report["served"]["accuracy"] == standing.mean() == report["left"]["rays"]
    assert found.attacks["transfer of apgd"].sum() > 0.1 * N  # an undefended classifier


def test_black_box_attacks_alone_bring_down_an_undefended_file(path: Path, images: tuple[Tensor, Tensor]) -> None:
    found = attack_file(OnnxSystem(path, "cpu"), *images, THREAT, SEARCH)
    assert list(found.attacks) == ["square", "rays"]
    assert found.all.sum() - found.clean.sum() >= 0.05 * N


def test_stored_images_count_only_inside_the_ball(path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    file = OnnxSystem(path, "cpu")
    far = (x + 0.2).clamp(0, 1)
    for stored, fall in ((1 - x, False), (far, False)):
        found = attack_file(file, x, y, THREAT, Search(1, 1), stored=stored)
        assert found.attacks["stored"].any() == fall
    wide = attack_file(file, x, y, ThreatModel("linf", 1.0), Search(1, 1), stored=1 - x)
    assert wide.attacks["stored"].any()


def test_rays_needs_linf(path: Path, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    found = attack_file(OnnxSystem(path, "cpu"), x[:10], y[:10], ThreatModel("l2", 0.5), Search(5, 1))
    assert list(found.attacks) == ["square"]


def test_a_file_of_grey_levels_is_attacked_within_whole_levels(plain: TorchSystem, tmp_path: Path) -> None:
    export_system(plain, tmp_path / "a.onnx", ABOUT, options=ExportOptions(layout="uint8-nhwc"))
    file = OnnxSystem(tmp_path / "a.onnx", "cpu")
    assert reachable(ThreatModel("linf", 0.1), file).radius == 25 / 255
    assert reachable(ThreatModel("linf", 8 / 255), file).radius == 8 / 255
    assert reachable(ThreatModel("l2", 0.1), file).radius == 0.1


def test_only_its_own_procedures_meet_a_system_without_an_adaptive_view(system: TorchSystem) -> None:
    assert list(crafted(system, SEARCH)) == ["apgd"]


# --- the verdict ----------------------------------------------------------------------------------------------


def table(fallen: np.ndarray) -> Table:
    return Table(np.arange(len(fallen)), fallen, ("pgd",))


def fell(clean: int, attacked: int) -> Fallen:
    """Of 100 images the first so many were wrong, and so many more fell."""
    at = np.arange(100)
    return Fallen(at < clean, {"square": (at >= clean) & (at < clean + attacked)})


@pytest.mark.parametrize(("attacked", "passed"), [(0, True), (10, True), (12, True), (13, False), (50, False)])
def test_the_margin(attacked: int, passed: bool) -> None:
    gate = judge(fell(0, attacked), table(np.arange(100) < 10), np.arange(100), 0.02, [])
    assert gate.passed is passed
    assert gate.checks[-1].value == pytest.approx(1 - attacked / 100) and gate.checks[-1].bound == pytest.approx(0.88)
    assert gate.table is not None and gate.table.accuracy == 0.9


def test_the_comparison_is_on_the_same_images() -> None:
    whole = Table(np.arange(200), np.arange(200) >= 100, ("pgd",))  # the images 0 to 99 all stand
    assert judge(fell(0, 3), whole, np.arange(100), 0.02, []).passed is False
    assert judge(fell(0, 3), whole, np.arange(100)[::-1], 0.04, []).passed is True
    with pytest.raises(ValueError, match="does not have"):
        judge(fell(0, 3), table(np.zeros(50, bool)), np.arange(100), 0.02, [])


def test_a_failed_parity_and_a_system_without_a_worst_case_do_not_pass() -> None:
    check = {"name": "logits", "value": 1.0, "bound": 0.1, "at_least": False, "passed": False, "detail": "differ"}
    assert not judge(fell(0, 0), table(np.zeros(100, bool)), np.arange(100), 0.5, [check]).passed
    gate = judge(fell(0, 0), None, np.arange(100), 0.5, [])
    assert not gate.passed and gate.table is None and [c.name for c in gate.checks] == ["evaluated"]


def test_a_system_of_no_evaluation_is_compared_with_what_was_crafted_on_it(found: Fallen) -> None:
    assert list(found.source) == ["apgd"] and found.source["apgd"].any()
    assert np.array_equal(found.source["apgd"], found.attacks["transfer of apgd"])
    gate = judge_by_source(found, 0.5, [])
    assert gate.table is not None and gate.table.attacks == ("apgd",)
    crafted = int((found.clean | found.source["apgd"]).sum())
    assert gate.table.accuracy == pytest.approx(1 - crafted / N)
    black_box = int(found.all.sum()) - crafted
    for margin in (0.0, black_box / N, 1.0):
        assert judge_by_source(found, margin, []).passed is (black_box <= margin * N)
    blind = judge_by_source(fell(0, 0), 0.5, [])
    assert not blind.passed and blind.table is None


def test_a_true_file_passes_and_a_broken_one_does_not(
    path: Path, plain: TorchSystem, images: tuple[Tensor, Tensor], found: Fallen, data: EvaluationSet, tmp_path: Path
) -> None:
    def gate(file: Path, fallen: Fallen) -> Gate:
        test = Labelled(data.images.images[:N], data.images.labels[:N])
        return judge(fallen, table(found.all), np.arange(N), 0.02, parity_report(plain, file, test)["checks"])

    assert gate(path, found).passed
    wrong = broken(path, tmp_path / "broken.onnx")
    verdict = gate(wrong, attack_file(OnnxSystem(wrong, "cpu"), *images, THREAT, SEARCH))
    assert {c.name for c in verdict.checks if not c.passed} >= {"served", "logits", "clean accuracy"}


# --- the table, and the card ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(plain: TorchSystem, data: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(report, folder) of a short evaluation."""
    folder = tmp_path_factory.mktemp("evaluated")
    cells = {
        "pgd": {"attack": "pgd", "options": {"steps": 5}}, "fgsm": {"attack": "fgsm"},
        "l2": {"attack": "pgd", "options": {"steps": 5}, "threat": {"norm": "l2", "radius": 0.5}},
    }  # fmt: skip
    params = EvaluateParams.model_validate({
        "chunk": 50, "subset": 50, "gate": None,
        "sweep": {"attack": "pgd", "options": {"steps": 2}, "radii": [0.5], "images": 50},
        "suites": {"core": {"images": 100, "attacks": {"pgd": cells["pgd"]}},
                   "extended": {"images": 60, "attacks": {k: cells[k] for k in ("fgsm", "l2")}}},
    })  # fmt: skip
    about = AboutRow("quick", "row", "standard", "digits", "digits_cnn", tuple("0123456789"), {})
    done = evaluate_row(
        about, [Candidate(plain)], data, THREAT, params, Ledger(folder / "ledger"), say=lambda line: None
    )
    done.save(folder)
    return done.report, folder


def test_the_table_is_the_worst_case_of_the_report(evaluated: Any, data: EvaluationSet) -> None:
    report, folder = evaluated
    found = read_table(folder / "ledger.parquet", "row", THREAT, data.dimensions)
    worst = report["systems"][0]["worst"]["all"]["adaptive"]
    assert found is not None and len(found.index) == worst["n"] == 60
    assert robustness.rate(found.fallen)["accuracy"] == worst["accuracy"] < 0.9
    assert set(found.attacks) == {name.partition("/")[2] for name in worst["attacks"]} == {"pgd", "fgsm", "l2"}
    assert read_table(folder / "ledger.parquet", "another", THREAT, data.dimensions) is None


CARD = {"dataset": "digits", "classes": list("0123456789"), "network": {"name": "digits_cnn"},
        "data_checksum": "ab", "seed": 0, "effective_epochs": 3.0}  # fmt: skip


def test_the_card_says_what_was_measured(path: Path, evaluated: Any) -> None:
    report, _ = evaluated
    card = make_card(OnnxSystem(path, "cpu"), CARD, report, "plain", None)
    assert (card.form, card.variant, card.dataset, card.gate) == ("plain", "float32", "digits", None)
    assert card.threat.radius == 0.1 and card.robust.keys() == {"core", "extended", "all"}
    assert card.robust["all"].n == 60 and card.clean is not None and card.clean.n == 100
    assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(card.text())["schema"] == "casemate-card/1"


def test_a_mode_that_was_not_evaluated_has_no_number(path: Path, evaluated: Any) -> None:
    card = make_card(OnnxSystem(path, "cpu"), CARD, evaluated[0], "imt", None)
    assert card.robust == {} and card.clean is None and card.verdict == "not run"


def test_a_file_of_other_data_or_of_another_maker_gets_no_card(
    path: Path, plain: TorchSystem, evaluated: Any, tmp_path: Path
) -> None:
    other = About("fashion", tuple("0123456789"), "linf", 0.1)
    export_system(plain, tmp_path / "a.onnx", other)
    with pytest.raises(UserError, match="is for fashion, and its row for digits"):
        make_card(OnnxSystem(tmp_path / "a.onnx", "cpu"), CARD, evaluated[0], "plain", None)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="was not exported by casemate"):
        make_card(OnnxSystem(tmp_path / "foreign.onnx", "cpu"), CARD, evaluated[0], "plain", None)
