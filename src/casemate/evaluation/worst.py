"""The worst case of each suite, and of all of them together, over the cells of one system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from casemate.evaluation import robustness
from casemate.evaluation.masking import Finished
from casemate.system import System
from casemate.threat import ThreatModel


def worst_cases(system: System, finished: Sequence[Finished], threat: ThreatModel) -> dict[str, Any]:
    """{suite or "all": {"adaptive", "static", "published"}}, each as `robustness.worst_case` has it.

    The adaptive worst case is over every cell, since an adaptive attacker has the static attacks too; the static one
    over static cells alone; the published one over these and the attacks of the defense's own paper. Both are None
    for a system with one face. A cell with a budget of its own takes part where it covers all images of the others.
    """
    suites = list(dict.fromkeys(f.planned.suite for f in finished))
    worst: dict[str, Any] = {}
    for suite in [*suites, "all"]:
        mine = covering([f for f in finished if suite in (f.planned.suite, "all")], threat)
        static = {_key(f, suite): f.cell for f in mine if f.planned.view == "static"}
        named = [(_key(f, suite) + (" (static)" if f.planned.view == "static" else ""), f) for f in mine]
        everything = {name: f.cell for name, f in named}
        published = {name: f.cell for name, f in named if f.planned.published}
        worst[suite] = {
            "adaptive": robustness.worst_case(everything, threat),
            "static": robustness.worst_case(static, threat) if system.changes_inference else None,
            "published": robustness.worst_case(published, threat) if system.changes_inference else None,
        }
    return worst


def covering(cells: Sequence[Finished], threat: ThreatModel) -> list[Finished]:
    """The cells under `threat`, and of the others those that do not make the common images fewer."""
    own = [f for f in cells if f.planned.budget == threat]
    if not own:
        return list(cells)
    images = robustness.common_images([f.cell for f in own])
    return [f for f in cells if f in own or np.isin(images, f.cell.rows["index"]).all()]


def _key(finished: Finished, suite: str) -> str:
    name = finished.planned.name
    return f"{finished.planned.suite}/{name}" if suite == "all" else name
