"""The study of the internal Wasserstein distance: success rates, how far attacks go, what tau and beta do.

Everything is computed from stored adversarial images, one `Attacked` for each attack on each model, and written as
JSON; `casemate.reporting.study` draws it. Success is counted among the images that were right before, and that number
stands beside every rate. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from casemate.errors import UserError
from casemate.evaluation.attacked import Attacked
from casemate.evaluation.robustness import wilson

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x, x_adv), both N x C x H x W float32 in [0, 1] -> (N,) distances."""
BINS, SPREAD = 40, (0.5, 99.5)
BLOCK = 64  # images that are measured at once: memory does not grow with their number
RADII = (0.005, 0.01, 0.02, 0.03, 0.05)
"""Of IWD per element, at which the share of successes within is given."""

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "Inception-v3, natural": {"FGSM": 69.78, "stAdv": 99.45, "EOT": 99.73, "ADef": 100.0, "IWDA": 100.0},
    "Inception-v3, free-PGD": {"FGSM": 15.51, "stAdv": 69.31, "EOT": 88.12, "ADef": 97.36, "IWDA": 100.0},
    "ResNet-101, natural": {"FGSM": 89.43, "stAdv": 99.73, "EOT": 99.46, "ADef": 100.0, "IWDA": 100.0},
    "ResNet-101, free-PGD": {"FGSM": 18.83, "stAdv": 61.42, "EOT": 91.12, "ADef": 97.22, "IWDA": 100.0},
    "Inception-v3, natural, targeted": {"FGSM": 0.27, "stAdv": 18.96, "EOT": 48.63, "ADef": 55.77, "IWDA": 90.66},
    "ResNet-101, natural, targeted": {"FGSM": 1.90, "stAdv": 59.35, "EOT": 79.13, "ADef": 87.26, "IWDA": 94.58},
}
"""Table 1 of the paper, in percent. `denominators` tells of how many of the 500 images its rates can be: 364, 303,
369, 324, 364 and 369, those that a 1,000-class model has right, but for one (91.12; the nearest is 91.05)."""


# --- success --------------------------------------------------------------------------------------------------


def success(case: Attacked) -> dict[str, Any]:
    """One cell of Table 1: {"asr", "low", "high", "hits", "n" (right before), "images" (all), "clean_accuracy",
    "accuracy" (under attack, clean errors counted)}; of K draws also "asr_any" and "draws"; and "oracle_agrees", the
    share of successes that the oracle still gives the true label, None where nothing succeeded."""
    right, hits = case.right, case.hits
    n, first = int(right.sum()), int(hits[:, 0].sum())
    low, high = wilson(first, n)
    clean = case.prediction_clean == case.labels
    out: dict[str, Any] = {
        "asr": _share(first, n), "low": low, "high": high, "hits": first, "n": n, "images": len(case.labels),
        "clean_accuracy": _share(int(clean.sum()), len(clean)),
        "accuracy": _share(int((clean & ~hits[:, 0]).sum()), len(clean)),
    }  # fmt: skip
    if hits.shape[1] > 1:
        out |= {"asr_any": _share(int(hits.any(1).sum()), n), "draws": hits.shape[1]}
    if case.oracle is not None:
        agree = (case.oracle == case.labels)[hits[:, 0]]
        out["oracle_agrees"] = _share(int(agree.sum()), len(agree))
    return out


def success_table(cases: Sequence[Attacked]) -> dict[str, dict[str, dict[str, Any]]]:
    """model -> attack -> `success`, in the order given. Raises UserError for the same pair twice."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        row = table.setdefault(_row(case), {})
        if case.attack in row:
            raise UserError(f"{_row(case)}: attack {case.attack} is there twice")
        row[case.attack] = success(case)
    return table


def _row(case: Attacked) -> str:
    return case.model if case.targets is None else f"{case.model}, targeted"


def denominators(rates: Sequence[float], images: int = 500, digits: int = 2) -> list[int]:
    """Numbers of images, `images` at most, of which every one of the printed rates (percent) is a whole number."""
    half = 0.5 * 10**-digits + 1e-9
    found = []
    for n in range(1, images + 1):
        counts = np.round(np.asarray(rates) * n / 100)
        if (np.abs(100 * counts / n - np.asarray(rates)) <= half).all():
            found.append(n)
    return found


# --- distances ------------------------------------------------------------------------------------------------


def linf(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
    largest: np.ndarray = _delta(x, x_adv).max(1)
    return largest


def l2(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.square(_delta(x, x_adv)).sum(1))
    return root


def mean_abs(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
    mean: np.ndarray = _delta(x, x_adv).mean(1)
    return mean


def _delta(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
    gap: np.ndarray = np.abs(x_adv.astype(np.float64) - x).reshape(len(x), -1)
    return gap


LP: Mapping[str, Distance] = {"linf": linf, "l2": l2, "mean_abs": mean_abs}


def with_iwd(protocol: str = "imagenet") -> dict[str, Distance]:
    """`LP` and the exact internal Wasserstein distance, per element, under each of a protocol's windows
    (`casemate.iwd.PROTOCOLS`), whose text is the column's name."""
    from casemate.iwd import PROTOCOLS

    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol {protocol!r}; known: {', '.join(sorted(PROTOCOLS))}")
    return {**LP, **{f"iwd {windows}": _exact(windows) for windows in PROTOCOLS[protocol]}}


def _exact(windows: Any) -> Distance:
    def distance(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
        import torch

        from casemate.iwd import measure

        found: np.ndarray = measure(torch.from_numpy(x), torch.from_numpy(x_adv), windows).excess
        return found

    return distance


def remembered(distances: Mapping[str, Distance]) -> dict[str, Distance]:
    """The same, each pair of batches measured once: a case may be in the figures and in an ablation."""
    known: dict[tuple[str, bytes], np.ndarray] = {}

    def once(name: str, distance: Distance, x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
        key = (name, hashlib.sha256(x.tobytes() + x_adv.tobytes()).digest())
        if key not in known:
            known[key] = distance(x, x_adv)
        return known[key]

    return {name: partial(once, name, distance) for name, distance in distances.items()}


def measured(case: Attacked, distances: Mapping[str, Distance], images: int | None = None) -> dict[str, np.ndarray]:
    """(n,) of each distance on the first `images` (all, if None) successful images."""
    if case.x_clean is None or case.x_adv is None:
        raise UserError(f"{case.model}, {case.attack}: distances need the images, and they were not kept")
    hits = np.flatnonzero(case.hits[:, 0])[:images]
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in distances}
    for start in range(0, len(hits), BLOCK):
        at = hits[start : start + BLOCK]
        x, x_adv = case.x_clean[at], case.x_adv[at]
        for name, distance in distances.items():
            found[name].append(distance(x, x_adv))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def histograms(found: Mapping[str, Mapping[str, np.ndarray]], logarithmic: Sequence[str] = ("l2",)) -> dict[str, Any]:
    """Figure 6: of `measured` by attack, each distance over bins that all attacks share.

    {distance: {"edges", "log", "attacks": {attack: {"n", "density", "outside", "mean", "median", "q25", "q75"}}}}.
    The 40 bins run from the pooled 0.5th to the 99.5th percentile; `density` are shares of n in them, and `outside`
    is the share beyond, so they add up to 1. A distance that is zero somewhere has no logarithmic scale.
    """
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    out: dict[str, Any] = {}
    for name in names:
        by_attack = {
            attack: np.asarray(values[name], np.float64) for attack, values in found.items() if name in values
        }
        pooled = np.concatenate(list(by_attack.values()))
        if not len(pooled):
            continue
        log = name in logarithmic and pooled.min() > 0
        low, high = np.percentile(pooled, SPREAD)
        if high <= low:
            low, high = (low / 1.1, high * 1.1) if log else (low - 0.5e-3, high + 0.5e-3)
        edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
        attacks = {attack: _histogram(values, edges) for attack, values in by_attack.items()}
        out[name] = {"edges": edges.tolist(), "log": bool(log), "attacks": attacks}
    return out


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    n = len(values)
    if not n:
        return {"n": 0, "density": [0.0] * BINS, "outside": 0.0, **dict.fromkeys(("mean", "median", "q25", "q75"))}
    counts, _ = np.histogram(values, edges)
    q25, median, q75 = (float(q) for q in np.percentile(values, [25, 50, 75]))
    return {
        "n": n, "density": (counts / n).tolist(), "outside": 1 - int(counts.sum()) / n, "mean": float(values.mean()),
        "median": median, "q25": q25, "q75": q75,
    }  # fmt: skip


def success_within(case: Attacked, distances: np.ndarray, radii: Sequence[float] = RADII) -> list[dict[str, Any]]:
    """Success rate within each radius, from a distance of every success: what compares attacks of unlike budgets."""
    n, hits = int(case.right.sum()), int(case.hits[:, 0].sum())
    if len(distances) != hits:
        raise UserError(f"{case.model}, {case.attack}: {len(distances)} distances for {hits} successes")
    out = []
    for radius in radii:
        inside = int((distances <= radius).sum())
        low, high = wilson(inside, n)
        out.append({"radius": radius, "asr": _share(inside, n), "low": low, "high": high, "n": n})
    return out


# --- ablations ------------------------------------------------------------------------------------------------


def ablation(
    option: str, cases: Mapping[float, Sequence[Attacked]], distances: Mapping[str, Distance] | None = None,
    images: int | None = None, merge: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A table over the values of one option: tau of the attack, beta of the defense.

    `merge`: the cases are one attack under several values of its own option, and go by that one name.

    {"option", "rows": [{"value", "model", "attack", ...`success`, "<distance>" (median over successes)}]}. Where the
    value 0 is among them each row has "excess", its rate less that of 0 for the same attack: without a classification
    loss an attack that writes a new image succeeds at some rate already, and only the rest is due to it.
    """
    rows: list[dict[str, Any]] = []
    for value in sorted(cases):
        for case in cases[value]:
            names = {"model": case.model, "attack": option if merge else case.attack}
            row = {"value": float(value), **names, "cell": case.attack, **success(case)}
            if distances:
                found = measured(case, distances, images)
                row |= {name: float(np.median(d)) if len(d) else None for name, d in found.items()}
            rows.append(row)
    control = {(row["attack"], merge and row["model"]): row["asr"] for row in rows if row["value"] == 0}
    for row in rows:
        before = control.get((row["attack"], merge and row["model"]))
        if before is not None and row["asr"] is not None:
            row["excess"] = row["asr"] - before
    return {"option": option, "rows": rows}


# --- together -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What is written: `table` (Table 1), `figures` (Figure 6) by model, `within` by both, `ablations`."""

    table: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    within: dict[str, Any] = field(default_factory=dict)
    ablations: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    """The conditions: what was run on what."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the published table and the denominators that its rates allow."""
        published = {
            row: {"percent": dict(rates), "denominators": denominators([r for r in rates.values() if r != 91.12])}
            for row, rates in PUBLISHED.items()
        }
        return {
            "schema": 1, "about": self.about, "table": self.table, "figures": self.figures, "within": self.within,
            "ablations": self.ablations, "published": published,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write it as JSON, to a temporary name and renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(rounded(self.as_dict()), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)


def study(
    cases: Sequence[Attacked], distances: Mapping[str, Distance] = LP, *, images: int | None = None,
    ablations: Sequence[dict[str, Any]] = (), about: Mapping[str, Any] | None = None,
) -> Study:  # fmt: skip
    """The whole of it. Distances are measured on the first `images` successes of every attack whose images were kept;
    `within` needs all of them, so it is there for attacks with no more successes. `distances`: see `with_iwd`."""
    table = success_table(cases)
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    within: dict[str, Any] = {}
    for case in cases:
        if case.x_adv is None:
            continue
        mine = found.setdefault(_row(case), {})[case.attack] = measured(case, distances, images)
        for name, values in mine.items():
            if name.startswith("iwd") and (images is None or len(values) == int(case.hits[:, 0].sum())):
                within.setdefault(_row(case), {}).setdefault(case.attack, {})[name] = success_within(case, values)
    return Study(
        table, {row: histograms(by) for row, by in found.items()}, within, list(ablations), dict(about or {})
    )


def rounded(content: Any) -> Any:
    """The same with six digits of every number: what is written is looked at, and committed."""
    if isinstance(content, Mapping):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


def _share(hits: int, n: int) -> float | None:
    return hits / n if n else None
