"""Numbers and findings in words: how figures are written, and the sentences that state what was found."""

from __future__ import annotations

from collections.abc import Sequence

from casemate.reporting.inputs import Evaluation, Rate
from casemate.reporting.leaderboard import Entry, Leaderboard, champion, chosen_apart, eligible

DATASETS = {
    "digits": "digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "svhn": "SVHN", "stl10": "STL-10", "tinyimagenet": "Tiny ImageNet (200 classes)",
    "imagenet10": "ImageNet (10 classes)",
}  # fmt: skip
SAID = {"unreliable": "is judged unreliable", "failed": "failed its floor"}
NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}


def percent(value: float | None) -> str:
    """0.92345 -> `92.3`; None -> an en dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A signed difference in percentage points: 0.5 -> `+50.0`, -0.01 -> `−1.0`."""
    if value is None:
        return "–"
    return "0.0" if abs(value) < 5e-4 else f"{100 * value:+.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """10000 -> `10,000`; 12.34 -> `12.3`; None -> an en dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.1f}"


def figure(value: object) -> str:
    """Any value of a card, a parity report or a check, short and readable."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(figure(v) for v in value)
    return "–" if value is None else str(value)


def tight(text: str) -> str:
    """`92.3 %` -> `92.3%`, as everywhere on the page."""
    return text.replace(" %", "%")


def interval(rate: Rate) -> str:
    """`91.8 – 92.9`, in per cent."""
    return f"{percent(rate.low)} – {percent(rate.high)}"


def dataset(name: str) -> str:
    """The dataset's usual name."""
    return DATASETS.get(name, name)


def threat(text: str) -> str:
    """`linf 0.3` -> `ℓ∞ radius 0.3`; what is no ball is named as it is, `flow tau 0.05`."""
    norm, _, radius = text.partition(" ")
    return f"{NORMS[norm]} radius {radius}" if norm in NORMS else text


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def finding(board: Leaderboard) -> str:
    """The result in one sentence, with the conditions it was found under."""
    best = champion(board) or next(iter(board.ranked), None)
    if best is None:
        reasons = listed([f"{e.system} {SAID.get(e.status, f'is {e.status}')}" for e in board.unranked])
        return f"No system can be ranked: {reasons}." if reasons else "No system was evaluated."
    attacks = f"the worst of {best.attacks} attacks" if best.attacks > 1 else "one attack"
    unchecked = "" if best.verdict == "ok" else f"; its masking gate was {best.verdict}"
    holds = f"{best.system} holds best: it"
    if best.rank != 1:
        holds = (
            f"{best.system}, the best on {count(best.selection_n)} validation images, is number {best.rank} here: it"
        )
    if (best.worst_all or 0.0) < 0.005:
        holds = f"No system holds: the best of them, {best.system},"
    return (
        f"{holds} classifies {percent(best.worst_all)}% of {dataset(best.dataset)} test images "
        f"correctly under {attacks} at {threat(best.threat)} "
        f"(95% interval {percent(best.worst_all_low)} to {percent(best.worst_all_high)}, "
        f"n\u00a0=\u00a0{count(best.worst_all_n)}) and {percent(best.clean)}% without attack, "
        f"{_training(best)}{unchecked}."
    )


def _training(entry: Entry) -> str:
    seed = "one training run" if entry.train_seed is None else f"one training run (seed {entry.train_seed})"
    return f"in {seed} at {'full budget' if entry.budget == 1 else f'{entry.budget:g} of the full budget'}"


def remarks(board: Leaderboard) -> list[str]:
    """What a reader must know beside the finding: an order the run does not settle, a lower figure on more images,
    and the widest gap to what a paper would report."""
    said: list[str] = []
    best = champion(board) or next(iter(board.ranked), None)
    if best is not None and best.worst_all_low is not None:
        near = [e.system for e in board.ranked if e is not best and (e.worst_all_high or 0.0) >= best.worst_all_low]
        if near:
            order = "this run does not settle their order"
            said.append(f"The interval of {best.system} overlaps that of {listed(near)}: {order}.")
    if best is not None and best.least is not None and best.least < (best.worst_all or 0.0):
        said.append(
            f"The suite {best.least_suite} alone leaves {best.system} {percent(best.least)}% of "
            f"{count(best.least_n)} images (95% interval {percent(best.least_low)} to {percent(best.least_high)}): "
            f"the {count(best.worst_all_n)} that every attack was run on are kinder than the rest."
        )
    if best is not None and len(rivals := eligible(board)) > 1:
        said.append(_choice(best, len(rivals), chosen_apart(board)))
    gaps = [e for e in board.entries if e.gap is not None and e.gap >= 0.05 and e.status != "untrained"]
    widest = max(gaps, key=lambda e: (e.gap or 0.0, e.system), default=None)
    if widest is not None:
        said.append(
            f"{widest.system} seems to keep {percent(widest.published)}% under the strongest attack that a paper "
            f"would report ({widest.published_attack}, n\u00a0=\u00a0{count(widest.published_n)}), and keeps "
            f"{percent(widest.worst_all)}% under attacks that account for its test-time defense."
        )
    return said


def _choice(best: Entry, rivals: int, apart: bool) -> str:
    if not apart:
        return (
            f"{best.system} was chosen as the best of {rivals} by these very images, so its figure leans "
            "towards the lucky: no other images were asked."
        )
    return (
        f"{best.system} was chosen out of {rivals} on {count(best.selection_n)} validation images, of which it "
        f"keeps {percent(best.selection)}%: no test image had a say."
    )


def scaled_down(evaluations: Sequence[Evaluation]) -> str | None:
    """The warning of a run whose budget is not 1, or None."""
    budgets = sorted({e.budget for e in evaluations if e.budget != 1})
    if not budgets:
        return None
    shares = listed([f"{b:g}" for b in budgets])
    return (
        f"Scaled-down run: epochs and attack steps were cut to {shares} of the full settings. "
        "Weaker attacks flatter a defense and shorter training hurts it: do not compare these figures with full runs."
    )
