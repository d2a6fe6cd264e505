"""The questions of the masking gate, one function each: what it asks of which cells, and when the answer is bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from casemate.attacks import diagnostics
from casemate.evaluation.ledger import Cell, full_precision
from casemate.evaluation.plan import Planned, Runner
from casemate.evaluation.robustness import SIGNIFICANT, beats, binomial_tail, common_images, fallen
from casemate.evaluation.schema import GateParams
from casemate.system import System
from casemate.threat import ThreatModel, radius_text, untargeted

TOLERATED = 0.01
"""Share of images that may survive the unbounded attack, or have no gradient."""
LUCK = 0.002
"""Share of images on which random search may find what gradients missed."""
FAR = 0.02
"""An attack's static accuracy above its adaptive one by more than this, and beyond chance, is an illusion."""
MANY = 0.03
"""Restarts, or another loss, that fell more than this share of the images beyond chance: the single attack is no
evidence. Adversarially trained LeNet-5 on MNIST loses 1.3 to 2.1 points to ten starts of PGD."""


@dataclass(frozen=True)
class Check:
    """One question. `concerns` says what a failure discredits: the system's figures, those of its static column, or a
    single attack of the kind asked about, in which case the worst case over attacks stands."""

    name: str
    passed: bool
    detail: str
    p: float | None = None
    concerns: Literal["system", "static", "attack"] = "system"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "p": None if self.p is None else float(f"{self.p:.4g}")}


@dataclass(frozen=True)
class Finished:
    """A planned cell with its rows."""

    planned: Planned
    cell: Cell

    @property
    def white_box(self) -> bool:
        return "gradient" in self.planned.attack.needs


def single_step(fgsm: Cell, pgd: Cell) -> Check:
    """An iterative attack must not be weaker than one step."""
    worse, p = outdoes(fgsm, pgd)
    detail = f"FGSM leaves {_left(fgsm)}, PGD {_left(pgd)} of {len(pgd):,} images"
    return Check("iterative not weaker than one step", not worse, detail, p)


def more_steps(fewer: Cell, more: Cell, params: GateParams) -> Check:
    """More steps must not be weaker."""
    worse, p = outdoes(fewer, more)
    detail = (
        f"PGD-{params.fewer_steps} leaves {_left(fewer)}, PGD-{params.steps} {_left(more)} of {len(more):,} images"
    )
    return Check("more steps not weaker", not worse, detail, p)


def more_restarts(once: Cell, often: Cell, params: GateParams) -> Check:
    """Another start must not change much, or a figure from a single one is too high."""
    worse, p = outdoes(often, once)
    gain = _gain(often, once)
    detail = (
        f"one start of PGD-{params.fewer_steps} leaves {_left(once)}, {params.restarts} leave {_left(often)} "
        f"of {len(once):,} images"
    )
    return Check("restarts change little", not (worse and gain > MANY), detail, p, "attack")


def loss_choice(cells: Mapping[str, Cell]) -> Check:
    """Of {loss: APGD's cell}, none may leave far less than cross-entropy, the loss of most published figures."""
    ce = cells["ce"]
    name, best = min(((n, c) for n, c in cells.items() if n != "ce"), key=lambda pair: -_gain(pair[1], ce))
    worse, p = outdoes(best, ce)
    detail = f"APGD leaves {_left(ce)} by cross-entropy, {_left(best)} by {name}, of {len(ce):,} images"
    return Check("no loss far above cross-entropy", not (worse and _gain(best, ce) > MANY), detail, p, "attack")


def more_radius(series: Sequence[tuple[float, Cell]]) -> Check:
    """Accuracy must not rise with the radius; the worst step of the series is shown."""
    steps = []
    for (small, before), (large, after) in pairwise(series):
        worse, p = outdoes(before, after)
        detail = (
            f"{_left(before)} is left at radius {radius_text(small)}, {_left(after)} at {radius_text(large)}, "
            f"of {len(after):,} images"
        )
        steps.append((p, worse, detail))
    p, worse, detail = min(steps)
    return Check("more radius not weaker", not worse, detail, p)


def unbounded(cell: Cell) -> Check:
    """At linf 0.5 every image can become grey, so a sound gradient attack leaves next to nothing."""
    standing = int((~cell.rows["success"]).sum())
    detail = f"PGD at linf 0.5 leaves {standing:,} of {len(cell):,} images ({_percent(standing, len(cell))})"
    return Check("unbounded attack succeeds", standing < TOLERATED * len(cell), detail)


def zero_gradients(system: System, runner: Runner, images: int) -> Check:
    """Images that are classified rightly must have a gradient."""
    view = system.views()["adaptive"]
    right = silent = 0
    order = runner.order(images)
    with system.frozen(), full_precision():
        for start in range(0, len(order), runner.ledger.chunk):
            x, y = runner.data.take(order[start : start + runner.ledger.chunk])
            correct = system.decide(x) == y
            right += int(correct.sum())
            silent += int((diagnostics.zero_gradients(view, x, untargeted(y)) & correct).sum())
    detail = f"{silent:,} of {right:,} rightly classified images have no gradient at all ({_percent(silent, right)})"
    return Check("gradients are not zero", silent <= TOLERATED * right, detail)


def static_above_adaptive(system: System, suites: Sequence[Finished]) -> list[Check]:
    """An attack blind to what inference adds must not look far better than the same attack made adaptive.

    Asked of each attack by itself, on the images that its two faces have finished and under its own budget: a paper
    reports one attack, and the union of many blind ones fells what every single one of them leaves. One that fails
    is enough; the one that leaves least to chance is shown.
    """
    faces = {(_attack_of(f), f.planned.view): f.cell for f in suites}
    pairs = []
    for name, view in faces:
        if not system.changes_inference or view != "static" or (name, "adaptive") not in faces:
            continue
        blind, aware = faces[name, "static"], faces[name, "adaptive"]
        images = common_images([blind, aware])
        if not len(images):
            continue
        blind, aware = blind.at(images), aware.at(images)
        stronger, p = outdoes(aware, blind)
        gap = (int(aware.rows["success"].sum()) - int(blind.rows["success"].sum())) / len(images)
        detail = f"{name[1]}: static {_left(blind)} left, adaptive {_left(aware)} of {len(images):,} images"
        pairs.append((stronger and gap > FAR, -p, gap, detail))
    if not pairs:
        return []
    failed, p, _, detail = max(pairs)
    illusions = sum(pair[0] for pair in pairs)
    said = (
        f"the static protocol is an illusion in {illusions} of {len(pairs)} attacks, and its figures are not to be "
        "used" if failed else f"no illusion in any of {len(pairs)} attacks"
    )  # fmt: skip
    return [Check("static not far above adaptive", not failed, f"{detail}; {said}", -p, "static")]


def above_own_classifier(whole: Sequence[Finished], bare: Sequence[Finished], threat: ThreatModel) -> list[Check]:
    """What a defense adds at inference must not leave more than its classifier has without it, attacked by itself:
    where it does, the adaptive attacks are the likelier reason. `whole` and `bare` are the suites of the two.

    No defense of the kind has been found to gain anything once it was attacked as a whole (Croce et al. 2022).
    """
    cells = {name: [f.cell for f in suites if len(f.cell)] for name, suites in (("whole", whole), ("bare", bare))}
    if not all(cells.values()):
        return []
    images = common_images([cell for mine in cells.values() for cell in mine])
    if not len(images):
        return []
    down = {n: np.any([fallen(cell.at(images), threat) for cell in mine], axis=0) for n, mine in cells.items()}
    above, p = beats(down["bare"], down["whole"])
    left = {name: _percent(int((~rows).sum()), len(images)) for name, rows in down.items()}
    detail = (
        f"the worst case leaves {left['whole']}, and {left['bare']} of the classifier alone, of {len(images):,} "
        "images" + ("; raise the budgets of the adaptive attacks before claiming the difference" if above else "")
    )
    return [Check("inference adds nothing unexplained", not above, detail, p)]


def above_clean(suites: Sequence[Finished]) -> list[Check]:
    """A white-box attack that makes more images right than wrong does not climb the system's loss. One check for
    each face, the published protocol counting as static; the attack that leaves most right is shown."""
    checks = []
    faces: tuple[tuple[str, Literal["system", "static"]], ...] = (("adaptive", "system"), ("static", "static"))
    for view, concerns in faces:
        tried = []
        mine = (f for f in suites if f.planned.published == (view == "static"))
        for done in (f for f in mine if f.white_box and len(f.cell)):
            rows = done.cell.rows
            before, after = rows["clean_prediction"] == rows["label"], rows["prediction"] == rows["label"]
            above, p = beats(after, before)
            share = [_percent(int(right.sum()), len(right)) for right in (after, before)]
            detail = f"{_name(done)}: {share[0]} right under attack, {share[1]} clean, of {len(after):,} images"
            tried.append((p, -float(after.mean()), above, detail))
        if tried:
            p, _, above, detail = min(tried)
            checks.append(Check(f"no attack above clean ({view})", not above, detail, p, concerns))
    return checks


def black_above_white_box(suites: Sequence[Finished], threat: ThreatModel) -> list[Check]:
    """An attack without the gradient must not beat the strongest one that has it."""
    white = [f for f in suites if f.white_box and f.planned.view == "adaptive" and f.planned.budget == threat]
    checks = []
    for black in (f for f in suites if not f.white_box and f.planned.budget == threat):
        images = common_images([black.cell, *(w.cell for w in white)]) if white else np.empty(0)
        if not len(images):
            continue
        best = max(white, key=lambda f: int(f.cell.at(images).rows["success"].sum()))
        mine, theirs = black.cell.at(images), best.cell.at(images)
        stronger, p = beats(fallen(mine, threat), fallen(theirs, threat))
        detail = f"{_name(black)} leaves {_left(mine)}, {_name(best)} {_left(theirs)} of {len(images):,} images"
        checks.append(Check(f"black box ({_name(black)}) not above white box", not stronger, detail, p))
    return checks


def random_search(corners: Cell, white: Sequence[Cell], threat: ThreatModel) -> Check:
    """Random corners of the ball must not fell images that gradient attacks leave standing."""
    images = corners.rows["index"]
    covering = [cell.at(images) for cell in white if np.isin(images, cell.rows["index"]).all()]
    known = np.any([fallen(cell, threat) for cell in covering], axis=0)
    missed = int((corners.rows["success"] & ~known).sum())
    p = binomial_tail(missed, len(corners), LUCK)
    detail = (
        f"random corners fell {missed:,} of {len(corners):,} images that PGD and the suites' gradient attacks "
        f"left standing ({_percent(missed, len(corners))}; {100 * LUCK:.1f} % would be luck)"
    )
    return Check("random search finds nothing new", p >= SIGNIFICANT, detail, p)


def _attack_of(done: Finished) -> tuple[str, str]:
    return done.planned.suite, done.planned.name


# --- words --------------------------------------------------------------------------------------------------


def outdoes(first: Cell, second: Cell) -> tuple[bool, float]:
    """Whether `first` fells more of the images that both have finished, each under its own budget."""
    images = common_images([first, second])
    return beats(first.at(images).rows["success"], second.at(images).rows["success"])


def _gain(first: Cell, second: Cell) -> float:
    """How much larger a share of the images that both have finished `first` fells."""
    images = common_images([first, second])
    felled = [int(cell.at(images).rows["success"].sum()) for cell in (first, second)]
    return (felled[0] - felled[1]) / max(1, len(images))


def _left(cell: Cell) -> str:
    return _percent(int((~cell.rows["success"]).sum()), len(cell))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _name(done: Finished) -> str:
    return done.planned.name + (" (static)" if done.planned.view == "static" else "")
