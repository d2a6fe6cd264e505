"""Attacks of casemate and of other libraries at the same settings: what each leaves standing, and its time.

    python benchmarks/agreement.py [--model FOLDER --data NAME] [--images N] [--cases apgd_ce square] [--norms l2]

Without a model, the network of the tests is trained on the bundled digits. Other libraries are optional: what is not
installed is left out, and said. All results are judged alike: by the model's own decisions, inside the ball. Clean
errors count as fallen. An attack that draws noise is run for `--seeds` seeds on either side. Seconds are CPU time of
one thread. The cases are in `agreement_cases.py`; rows of earlier runs stay in the table until they are run again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where this file is run as a script

from benchmarks.agreement_cases import CASES, Case
from benchmarks.agreement_libraries import MODULES, PACKAGES, Run
from benchmarks.agreement_page import GOAL, page
from casemate.attacks.gradient import PGD
from casemate.objectives import margin
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted

ROOT = Path(__file__).resolve().parent.parent
BOUNDARY = 1e-3
"""Margin in logits below which an image lies on the boundary: rounding may decide it."""


@dataclass(frozen=True)
class Target:
    name: str
    system: TorchSystem
    x: Tensor
    y: Tensor
    radii: dict[str, float]

    def margins(self, x_adv: Tensor) -> Tensor:
        """(N,) largest other logit minus that of the label."""
        with torch.no_grad():
            return margin(self.system.logits(x_adv), untargeted(self.y))

    def wrong(self, x_adv: Tensor) -> Tensor:
        """(N,) bool by the model's own decisions."""
        with self.system.frozen():
            return self.system.decide(x_adv) != self.y

    def fallen(self, x_adv: Tensor, threat: ThreatModel) -> Tensor:
        """(N,) bool: wrong from the start, or wrong now and inside the ball."""
        return self.wrong(self.x) | (self.wrong(x_adv) & threat.contains(x_adv, self.x))


def digits_target(images: int) -> Target:
    """The network and the images of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from attack_toys import digits, system, trained_network

    x, y = digits()
    x, y = x[1500:][:images], y[1500:][:images]
    return Target("digits, plain training", system(trained_network(), (1, 8, 8), 10), x, y, {"linf": 0.08, "l2": 0.4})


def trained_target(folder: str, data: str, root: Path, images: int, radii: dict[str, float]) -> Target:
    """A trained row of the pipeline, on the front of the evaluation order."""
    from casemate.evaluation.bring import Request
    from casemate.evaluation.images import EvaluationSet, evaluation_order

    brought = Request(folder, data, root).load()
    assert isinstance(brought.system, TorchSystem), "the other libraries attack PyTorch models only"
    found = EvaluationSet(brought.images)
    x, y = found.take(evaluation_order(len(found))[:images])
    return Target(f"{data}, {Path(folder).name}", brought.system, x, y, radii)


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a library did: images and CPU seconds, one of each for every seed."""

    images: list[Tensor]
    seconds: list[float]


def outcomes(case: Case, target: Target, threat: ThreatModel, seeds: int) -> dict[str, Outcome]:
    """Ours first. Every library in turn for a seed, so that a busy machine slows all of them."""
    found = {name: Outcome([], []) for name in ["casemate", *filter(_installed, case.peers)]}
    goal = untargeted(target.y)
    for seed in range(seeds if case.noise else 1):
        for name, outcome in found.items():

            def ours(x: Tensor, y: Tensor, seed: int = seed) -> Tensor:
                return case.ours(target.system, x, goal, threat, seed).x_adv

            with target.system.frozen():
                run: Run = ours if name == "casemate" else case.peers[name](target.system.classifier, threat, seed)
                images, seconds = timed(run, target.x, target.y)
            outcome.images.append(images)
            outcome.seconds.append(seconds)
    return found


def timed(run: Run, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.thread_time()
        found = run(x, y)
    return found.detach(), time.thread_time() - begun


def _installed(library: str) -> bool:
    there = importlib.util.find_spec(MODULES.get(library, library)) is not None
    if not there:
        print(f"{library} is not installed: left out", file=sys.stderr)
    return there


# --- judging --------------------------------------------------------------------------------------------------------


def spread(falls: Tensor) -> float | None:
    """Variance of the mean number of fallen images over seeds, from `falls` (seeds x images); None for one seed.

    Images have noise of their own, so their variances add up, which tells more than a few totals do. Where a library
    lets them share it (Square), the totals vary more: the larger of the two estimates.
    """
    seeds = len(falls)
    if seeds < 2:
        return None
    falls = falls.double()
    return max(float(falls.var(0).sum()), float(falls.sum(1).var())) / seeds


def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float | None]:
    """How much more accuracy ours leaves than theirs (seeds x images, bool: fallen), and its standard error."""
    images = ours.shape[1]
    above = float(theirs.double().mean() - ours.double().mean())
    variances = [spread(ours), spread(theirs)]
    if None in variances:
        return above, None
    return above, sum(v for v in variances if v is not None) ** 0.5 / images


def judge_left(found: dict[str, Outcome], target: Target, threat: ThreatModel) -> Callable[[str], dict[str, Any]]:
    falls = {n: torch.stack([target.fallen(x, threat) for x in o.images]) for n, o in found.items()}

    def row(library: str) -> dict[str, Any]:
        each = [round(1 - float(share), 6) for share in falls[library].double().mean(1)]
        about = {"left": statistics.mean(each), "low": min(each), "high": max(each), "each": each}
        if library == "casemate":
            return about
        above, error = compare(falls["casemate"], falls[library])
        return {**about, "above": above, "error": error}

    return row


def judge_decisions(
    found: dict[str, Outcome], target: Target, threat: ThreatModel
) -> Callable[[str], dict[str, Any]]:
    falls = {name: target.fallen(outcome.images[0], threat) for name, outcome in found.items()}
    near = {name: target.margins(outcome.images[0]).abs() < BOUNDARY for name, outcome in found.items()}

    def row(library: str) -> dict[str, Any]:
        about = {"left": round(1 - float(falls[library].double().mean()), 6)}
        if library == "casemate":
            return about
        differ = falls["casemate"] != falls[library]
        boundary = differ & (near["casemate"] | near[library])
        return {**about, "differ": int(differ.sum()), "boundary": int(boundary.sum())}

    return row


def judge_norm(found: dict[str, Outcome], target: Target, threat: ThreatModel) -> Callable[[str], dict[str, Any]]:
    """Mean norms over the images that both have felled, and that were right before."""
    right = ~target.wrong(target.x)
    felled = {name: target.wrong(outcome.images[0]) & right for name, outcome in found.items()}
    norms = {name: threat.distance(outcome.images[0], target.x) for name, outcome in found.items()}

    def row(library: str) -> dict[str, Any]:
        both = felled["casemate"] & felled[library]
        about = {"right": int(right.sum()), "felled": int(felled[library].sum())}
        if library == "casemate":
            return {**about, "norm_mean": float(norms[library][both].mean())}
        mine, other = (float(norms[name][both].mean()) for name in ("casemate", library))
        return {**about, "both": int(both.sum()), "norm_ours": mine, "norm_mean": other, "ratio": mine / other}

    return row


JUDGES = {"left": judge_left, "decisions": judge_decisions, "norm": judge_norm}


def measure(case: Case, target: Target, norm: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each library, ours first."""
    threat = ThreatModel(norm, target.radii[norm])  # type: ignore[arg-type]
    found = outcomes(case, target, threat, seeds)
    judged = JUDGES[case.measure](found, target, threat)
    rows = []
    for library, outcome in found.items():
        times = [a / b for a, b in zip(outcome.seconds, found["casemate"].seconds, strict=True)]
        rows.append({
            "model": target.name, "images": len(target.x), "measure": case.measure, "case": case.name,
            "setting": case.setting, "norm": norm, "radius": None if case.measure == "norm" else threat.radius,
            "library": library, "version": importlib.metadata.version(PACKAGES.get(library, library)),
            "seeds": len(outcome.seconds) if case.noise else None, **judged(library),
            "seconds": round(statistics.median(outcome.seconds), 3), "times": round(statistics.median(times), 3),
        })  # fmt: skip
    return rows


# --- the command ----------------------------------------------------------------------------------------------------


def merge(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of earlier runs without those that `new` replaces, in the order of the cases."""
    order = [case.name for case in CASES]

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["model"], row["norm"], row["case"]

    made = {key(row) for row in new}
    rows = [row for row in known if key(row) not in made and row["case"] in order] + new
    return sorted(rows, key=lambda row: (row["model"], order.index(row["case"]), row["norm"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of a trained row; by default a network for the digits")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", type=Path, default=Path("data/raw"))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--radius-linf", type=float, default=0.3)
    parser.add_argument("--radius-l2", type=float, default=2.0)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"], choices=["linf", "l2"])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES], choices=[c.name for c in CASES])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "agreement.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    radii = {"linf": options.radius_linf, "l2": options.radius_l2}
    if options.model is None:
        target = digits_target(options.images)
    else:
        target = trained_target(options.model, options.data, options.data_root, options.images, radii)
    PGD(steps=2)(target.system, target.x, untargeted(target.y), ThreatModel("linf", 0.1))  # first passes are slower
    about: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "goal": GOAL}
    for case in (case for case in CASES if case.name in options.cases):
        for norm in (norm for norm in case.norms if norm in options.norms):
            new = measure(case, target, norm, options.seeds)
            known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
            about["rows"] = merge(known, new)
            options.json.write_text(json.dumps(about, indent=1) + "\n")
            options.json.with_suffix(".md").write_text(page(about))
            for row in new:
                shown = {k: v for k, v in row.items() if k not in ("model", "measure", "setting", "version", "each")}
                print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
