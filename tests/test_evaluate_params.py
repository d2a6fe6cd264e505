"""The parameters of an evaluation: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from row_toys import SUITES, params


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
