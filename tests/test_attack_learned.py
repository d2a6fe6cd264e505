"""What every attack that learns shares: how it is named, bound, hashed, checked, and marked where its fit failed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import trained_network
from learned_toys import SHAPE, fresh
from sklearn.datasets import load_digits
from test_reporting_samples import rows, write_profile

from casemate.attacks.base import Attack
from casemate.attacks.gap import GAP, GAPTrainer
from casemate.attacks.l2l import L2L, L2LTrainer
from casemate.attacks.learned import FittedAttack
from casemate.data.base import Images
from casemate.errors import UserError
from casemate.evaluation import keys
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About, Candidate, evaluate_row
from casemate.params import check_params
from casemate.registry import names, resolve, schema
from casemate.reporting import write_report
from casemate.system import TorchSystem
from casemate.threat import ThreatModel
from pipeline import profile

SPEC = GAPTrainer(width=4, blocks=1)


@pytest.mark.parametrize("name", names("learned_attack"))
def test_each_has_an_attack_of_its_name_that_takes_its_weights_and_no_others(name: str) -> None:
    attack, trainer = resolve("attack", name), resolve("learned_attack", name)
    assert attack.binds == "weights" and attack.trainer is trainer
    assert not set(schema("attack", name).model_fields) & set(schema("learned_attack", name).model_fields)
    fields = schema("learned_attack", name).model_fields
    small: dict[str, Any] = {key: value for key, value in {"width": 4, "blocks": 1}.items() if key in fields}
    spec, shape = trainer(**small), {**SHAPE, "input_shape": (1, 16, 16)}  # large enough for a patch
    bound = attack().with_weights(spec, fresh(spec, shape=shape), **shape)
    assert isinstance(bound, FittedAttack) and bound.needs == attack.needs and bound.binds is None
    parameters = bound.parameters()
    assert json.loads(json.dumps(parameters)) == parameters and "weights" in parameters
    assert {key: parameters[key] for key in small} == small
    stranger: Any = L2LTrainer(width=4) if name == "gap" else SPEC
    with pytest.raises(UserError, match=f"cannot use the weights of a {type(stranger).__name__}"):
        attack().with_weights(stranger, fresh(stranger, shape=shape), **shape)


def test_the_ledgers_key_follows_the_code_of_the_fitted_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = L2LTrainer(width=4)
    bound = L2L().with_weights(spec, fresh(spec), **SHAPE)
    before, real = keys.attack_code(bound), keys._hash
    monkeypatch.setattr(keys, "_hash", lambda path, at: "edited" if path.stem == "generators" else real(path, at))
    assert keys.attack_code(bound) != before
    gap = GAP().with_weights(SPEC, fresh(SPEC), **SHAPE)
    monkeypatch.undo()
    own = keys.attack_code(gap)
    monkeypatch.setattr(keys, "_hash", lambda path, at: "edited" if path.stem == "l2l" else real(path, at))
    assert keys.attack_code(gap) == own


# --- the check of the fit -------------------------------------------------------------------------------------


def cell(tmp_path: Path, limit: float, undefended: bool) -> dict[str, Any]:
    """The entry of an unfitted generator on a trained network at a radius that changes next to nothing."""
    bunch = load_digits()
    data = EvaluationSet(Images((bunch.images[:40, :, :, None] * 15).astype("uint8"), bunch.target[:40]))

    def bind(name: str, attack: Attack) -> Attack:
        return attack if attack.binds is None else attack.with_weights(SPEC, fresh(SPEC), **SHAPE)

    given = EvaluateParams.model_validate(
        {"suites": {"core": {"attacks": {"gap": {"attack": "gap"}, "fgsm": {"attack": "fgsm"}}}}, "gate": None,
         "fit_limit": limit, "subset": 0}
    )  # fmt: skip
    about = About("smoke", "row", "standard", "digits", "digits_cnn", tuple("0123456789"), {})
    system = TorchSystem(trained_network(), **SHAPE)
    done = evaluate_row(
        replace(about, undefended=undefended), [Candidate(system)], data, ThreatModel("linf", 1e-3), given,
        Ledger(tmp_path, 40), bind=bind, say=lambda _: None,
    )  # fmt: skip
    gap, fgsm = done.report["systems"][0]["cells"]
    assert "fit" not in fgsm and gap["accuracy"] > 0.5
    return dict(gap["fit"])


def test_an_undefended_model_checks_the_fit_and_any_other_cannot(tmp_path: Path) -> None:
    assert cell(tmp_path, 0.05, undefended=True) == {"limit": 0.05, "passed": False}
    assert cell(tmp_path, 1.0, undefended=True) == {"limit": 1.0, "passed": True}
    assert cell(tmp_path, 0.05, undefended=False) == {"limit": 0.05, "passed": None}


def test_the_page_marks_every_row_of_a_failed_fit(tmp_path: Path) -> None:
    found = rows()
    for row, passed, left in ((found[0], False, 0.212), (found[1], None, 0.95)):
        row["systems"][0]["cells"][3] |= {"fit": {"limit": 0.05, "passed": passed}, "accuracy": left}
    page = write_report(write_profile(tmp_path, found[:2]), tmp_path / "reports/mnist").read_text()
    said = (
        "The generator of pgd40_restarts5 failed its check on the undefended model: fitted to standard, it left 21.2%"
    )
    assert said in page and page.count('<span class="chip bad">fit failed</span>') == 2
    found[0]["systems"][0]["cells"][3]["fit"]["passed"] = True
    assert not write_profile(tmp_path / "passed", found[:2]).failed_fits


# --- parameters -----------------------------------------------------------------------------------------------


def with_generators(generators: dict[str, Any], gap: dict[str, Any]) -> dict[str, Any]:
    content = profile.resolved("mnist")
    content["finetune"] = {"generators": generators}
    content["evaluate"]["suites"] = {"extended": {"attacks": {"gap": gap}}}
    content["evaluate"]["procedures"] = None
    return content


def test_an_attack_that_learns_must_be_fitted_somewhere() -> None:
    recipe = {"epochs": 1, "lr": 0.001}
    with pytest.raises(UserError, match=r"extended.attacks.gap: no 'gap' under finetune.generators"):
        check_params(with_generators({}, {"attack": "gap"}))
    with pytest.raises(UserError, match=r"finetune\.generators\.gap fits l2l, not gap"):
        check_params(with_generators({"gap": {"method": "l2l", "recipe": recipe}}, {"attack": "gap"}))
    other = {"attack": "gap", "options": {"generator": "narrow"}}
    assert check_params(with_generators({"narrow": {"method": "gap", "recipe": recipe}}, other))


def test_weights_of_other_images_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="weights do not fit GAPTrainer") as caught:
        GAP().with_weights(SPEC, fresh(GAPTrainer(width=8, blocks=1)), **SHAPE)
    assert "\n" not in str(caught.value)
