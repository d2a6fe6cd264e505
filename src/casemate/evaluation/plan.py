"""Which cells a row's evaluation consists of, and what they will cost, before any of it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from casemate import registry
from casemate.attacks.aimed import Aimed
from casemate.attacks.base import Attack
from casemate.attacks.reduced import ReducedSearch
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet, evaluation_order
from casemate.evaluation.ledger import Cell, Ledger, Shard, full_precision
from casemate.evaluation.probes import RandomCorners
from casemate.evaluation.schema import AttackParams, CellParams, EvaluateParams, Sweep
from casemate.objectives import cross_entropy
from casemate.system import ANSWERS, System, View
from casemate.threat import ThreatModel, untargeted

Bind = Callable[[str, Attack], Attack | None]
"""Gives the attack what it needs besides the victim; None leaves it out for this row."""
"""(name of the cell, attack) -> the attack with what it must be bound to: a source system, fitted weights."""
Progress = Callable[[str, int, int], None]
"""(what is running, images done, images in all)."""


@dataclass(frozen=True)
class Planned:
    """One cell to run: an attack on the first `images` images of the evaluation order."""

    name: str
    suite: str
    method: str
    attack: Attack
    threat: ThreatModel
    view: str
    images: int

    @property
    def budget(self) -> Any:
        """What its successes are successes under: the threat model, or what the attack has in its place, such as a
        flow. Only cells of equal budgets may be compared."""
        return self.threat if self.attack.minimum_norm else self.attack.budget(self.threat)

    @property
    def published(self) -> bool:
        """Whether this is how papers evaluate such a system: an attack that leaves out what inference adds, or one
        of its own paper's. Kept in every worst case, and told apart in the report."""
        return self.attack.published or self.view == "static"

    def __str__(self) -> str:
        return f"{self.suite} {self.name}" + (" (static)" if self.view == "static" else "")


@dataclass
class Plan:
    """The cells of one system, and what is left out and why."""

    suites: list[Planned] = field(default_factory=list)
    sweep: list[Planned] = field(default_factory=list)
    """One cell for each radius above 0."""
    gate: list[Planned] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[Planned]:
        """All of them."""
        return [*self.suites, *self.sweep, *self.gate]


def bind_source(source: System | None) -> Bind:
    """Bind attacks that need one to this source system; anything else that needs binding is refused."""

    def bind(name: str, attack: Attack) -> Attack:
        if attack.binds is None:
            return attack
        if attack.binds == "source" and source is not None:
            return attack.with_source(source)
        mend = "; it is fitted by the finetune stage: put it in a suite of params.yaml"
        raise UserError(
            f"attack {name!r} needs its {attack.binds}, and none was given" + mend * (attack.binds == "weights")
        )

    return bind


def build_attack(name: str, params: AttackParams, budget: float, bind: Bind) -> Attack | None:
    """The registered attack with its options, its steps scaled by `budget` (at least one is left); None if `bind`
    leaves it out."""
    options: dict[str, Any] = registry.schema("attack", params.attack)(**params.options).model_dump()
    if budget != 1 and "steps" in options:
        options["steps"] = max(1, round(options["steps"] * budget))
    made = bind(name, registry.resolve("attack", params.attack)(**options))
    if made is not None and (draw := getattr(params, "target", None)) is not None:
        made = Aimed(made, draw)
    return ReducedSearch(made) if made is not None and params.search == "bf16" else made


def scaled(attack: Attack, budget: float) -> Attack:
    """The attack with its steps, where it has any, scaled by `budget`, as `build_attack` does it."""
    steps = getattr(attack, "steps", None)
    if budget == 1 or not isinstance(steps, int) or not is_dataclass(attack) or attack.published:
        return attack
    changed: Any = replace(attack, steps=max(1, round(steps * budget)))
    return cast(Attack, changed)


def plan_suites(
    system: System, params: EvaluateParams, threat: ThreatModel, *, total: int, most: int, budget: float, bind: Bind
) -> Plan:
    """Every cell of every suite for one system, on at most `most` of `total` images.

    A system that does not change its inference is attacked once; otherwise `view` says through which faces. An
    attack that asks for what the system does not offer is left out, and said; a system without gradient meets random
    corners of the ball in the first suite. The system's own procedures run in the suite `params.procedures`, by
    default that of the fewest images.
    """
    plan = Plan()
    home = params.procedures or min(params.suites, key=lambda suite: _images(params, suite, total))
    for suite, content in params.suites.items():
        images = min(most, _images(params, suite, total))
        for name, cell in content.attacks.items():
            attack = build_attack(name, cell, budget, bind)
            if attack is None:
                plan.skipped[name] = "is fitted to other rows only (finetune.victims)"
                continue
            missing = attack.needs - system.offers
            if missing:
                plan.skipped[name] = f"needs {', '.join(sorted(missing))}; this model offers {_offers(system)}"
                continue
            where = ThreatModel(cell.threat.norm, cell.threat.radius) if cell.threat else threat
            attack.accept(where)
            views = _views(system, cell, attack)
            plan.suites += [Planned(name, suite, cell.attack, attack, where, view, images) for view in views]
        for name, attack in (system.adaptive_attacks() if suite == home else {}).items():
            own = scaled(attack, budget)
            own.accept(threat)
            plan.suites.append(Planned(name, suite, type(own).__name__, own, threat, "adaptive", images))
        if "gradient" not in system.offers and suite == next(iter(params.suites)):
            corners = RandomCorners()  # the least that can be asked of a model that only shows its answers
            plan.suites.append(Planned("corners", suite, "random_corners", corners, threat, "adaptive", images))
    return plan


def _images(params: EvaluateParams, suite: str, total: int) -> int:
    asked = params.suites[suite].images
    return total if asked == "all" else min(asked, total)


def plan_sweep(sweep: Sweep, threat: ThreatModel, *, total: int, budget: float, bind: Bind) -> list[Planned]:
    """One cell for each radius above 0, on the adaptive view."""
    attack = build_attack("sweep", sweep, budget, bind)
    if attack is None:
        return []
    balls = [ThreatModel(threat.norm, radius) for radius in sweep.radii if radius > 0]
    images = min(sweep.images, total)
    return [Planned(str(ball), "sweep", sweep.attack, attack, ball, "adaptive", images) for ball in balls]


def _views(system: System, cell: CellParams, attack: Attack) -> list[str]:
    if not system.changes_inference or "gradient" not in attack.needs or attack.needs - ANSWERS:
        return ["adaptive"]  # one face, or an attack that looks at decisions only, or into inference itself
    if blind(system):
        return ["static"]
    wanted = ("adaptive", "static") if cell.view == "both" else (cell.view,)
    return [view for view in wanted if view in system.views()]


def _offers(system: System) -> str:
    return " and ".join(sorted(system.offers)) or "nothing"


def blind(system: System) -> bool:
    """Whether the system's faces leave out what its inference adds, so that only its own procedures are adaptive: it
    has no adaptive view, or one that is the static view by another name."""
    faces = system.views()
    if not system.changes_inference or "adaptive" not in faces:
        return system.changes_inference
    return "static" in faces and faces["static"].logits == faces["adaptive"].logits


def not_evaluated(system: System) -> str | None:
    """Why no number is printed for a system; None if it can be evaluated."""
    if system.stochastic and not system.draws:
        return "answers with noise, and offers no draws that attacks could average over: not evaluated"
    if blind(system) and not system.adaptive_attacks():
        return "changes its inference and ships no adaptive view or attack: not evaluated"
    return None


@dataclass(frozen=True)
class Runner:
    """Runs cells on one evaluation set, in the shared order, through one ledger."""

    ledger: Ledger
    data: EvaluationSet
    threat: ThreatModel
    seed: int = 0
    keep: int = 0
    """Adversarial images are kept for the first so many images."""
    progress: Progress | None = None
    shard: Shard | None = None
    """Which part of every cell to compute; all of it without one."""

    def order(self, images: int | None = None) -> list[int]:
        """The first `images` indices of the evaluation order; all of them without a number."""
        return evaluation_order(len(self.data))[:images]

    def finish(self, system: System, cell: Planned, *, row: str = "", keep: bool = False) -> Cell:
        """The cell, what is missing of it computed now. `row` goes before its name where progress is shown."""
        done = 0

        def report(more: int) -> None:
            nonlocal done
            done += more
            if self.progress is not None:
                self.progress(f"{row} {cell}".strip(), done, cell.images)

        return self.ledger.run(
            system, self.data, cell.attack, cell.threat, cell.view, self.order(cell.images), self.seed,
            keep=self.keep if keep else 0, shard=self.shard, progress=report,
        )  # fmt: skip

    def read(self, system: System, cell: Planned) -> Cell:
        """What the ledger holds of a cell."""
        order = self.order(cell.images)
        return self.ledger.read(system, self.data, cell.attack, cell.threat, cell.view, order, self.seed)


@dataclass(frozen=True)
class Cost:
    """An upper bound: attacks stop early on images that fall."""

    cells: int = 0
    images: int = 0
    """Attacked images, those found in the ledger left out."""
    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[Any, ...]:
        return self.cells, self.images, self.forwards, self.backwards, self.queries, self.seconds

    def __str__(self) -> str:
        if not self.images:
            return "nothing to compute: the ledger has it all"
        passes = f"{_short(self.forwards)} forwards, {_short(self.backwards)} backwards"
        queries = f", {_short(self.queries)} queries" if self.queries else ""
        return (
            f"{self.cells} cells, {self.images:,} images to attack, at most {passes}{queries}, "
            f"about {duration(self.seconds)} or less"
        )


def _short(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def estimate(system: System, cells: Iterable[Planned], runner: Runner) -> Cost:
    """What is still to be computed, with the time scaled up from a short probe of each face that is climbed."""
    total = Cost()
    speeds: dict[tuple[str, str], tuple[float, float]] = {}
    for cell in cells:
        left = cell.images - len(runner.read(system, cell))
        if not left:
            continue
        climbed: System = getattr(cell.attack, "source", system)
        name = cell.view if climbed is system else "adaptive"
        view = climbed.views()[name]
        forwards, backwards, queries = cell.attack.passes(system.views()[cell.view], left)
        if (climbed.hash(), name) not in speeds:
            speeds[climbed.hash(), name] = probe(climbed, view, runner)
        ascent, look = speeds[climbed.hash(), name]
        seconds = forwards / view.passes[0] * ascent + (queries + left) * look
        total += Cost(1, left, forwards, backwards, queries, seconds)
    return total


def probe(system: System, view: View, runner: Runner) -> tuple[float, float]:
    """Seconds per image of (logits and input gradient, logits alone), from a few batches of growing size."""
    gradient = look = 0.0
    with system.frozen(), full_precision():
        for size in (4, 4, 32, 128, 500):  # the first warms up
            indices = runner.order(min(size, len(runner.data)))
            x, y = runner.data.take(indices)
            gradient = look = _seconds(_look, view, x, y) / len(indices)
            if "gradient" in view.offers:
                gradient = _seconds(_climb, view, x, y) / len(indices)
            if (gradient + look) * len(indices) > 0.25 and size > 4:
                break
    return gradient, look


def _look(view: View, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        view.logits(x)


def _climb(view: View, x: Tensor, y: Tensor) -> None:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        loss = cross_entropy(view.logits(leaf), untargeted(y)).sum()
        torch.autograd.grad(loss, leaf, allow_unused=True)


def _seconds(work: Callable[[View, Tensor, Tensor], None], view: View, x: Tensor, y: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(view, x, y)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
