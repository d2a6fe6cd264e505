"""The rows of `agreement.py` as a page."""

from __future__ import annotations

from typing import Any

GOAL = 0.002
"""Accuracy that casemate may leave above another library at the same settings."""
RATIO = 1.05
"""Mean l2 norm of casemate's C&W over another's, at most."""
ERRORS = 2
"""A difference counts as more than the seeds' noise beyond the goal and this many standard errors."""

Row = dict[str, Any]

FACTS = {
    "fgsm pgd": [
        "ART's PGD cuts to the box before it projects on the ball, the others after it, which in l2 leaves ART the "
        "whole radius where a pixel meets the box.",
        "torchattacks takes gradients of the batch's mean loss, and in l2 divides by their length + 1e-10: the more "
        "images in the batch and the surer the network, the shorter its steps.",
    ],
    "cw_l2 cw_l2_early cw_l2_short": [
        "torchattacks' CW is left out: it has no search for the weight; its arctanh is infinite for black and white "
        "pixels, which therefore never move; and its largest other logit is a maximum with zeros among the logits.",
        "ART's CarliniL2Method goes down the gradient with a line search, not by Adam; doubles a weight that finds "
        "nothing, where the authors' code takes ten times more; and makes 10 iterations unless told otherwise. Its "
        "iterations cost several passes each.",
        "foolbox's early stop ends a round for the whole batch, by the sum of its losses, as the authors' code does; "
        "casemate's is each image's own.",
    ],
    "apgd_ce apgd_dlr apgd_t": [
        "In the authors' code and in torchattacks APGD's first step counts as a rise where its loss is above 0, not "
        "where it is above that of the start: they compare it with a row that the last step fills.",
    ],
    "apgd_t": [
        "torchattacks' APGDT in l2 moves every image by the step size of the first image in the batch.",
    ],
    "square": [
        "Square in the authors' code and in torchattacks draws one square for the whole batch, and its squares never "
        "cover the last row and column unless they cover all of them. casemate's images have squares of their own.",
    ],
    "autoattack": [
        "torchattacks' AutoAttack runs APGD, APGD-T and FAB for 10 steps, and Square with a rescaled schedule; it is "
        "compared as its four attacks in a row at the authors' settings.",
        "ART's AutoAttack is another ensemble (APGD on two losses, DeepFool, Square), and is not compared.",
    ],
}  # fmt: skip
"""{the cases it concerns: what a library does otherwise}, as read in the versions of the table."""


def page(about: dict[str, Any]) -> str:
    """The tables of all rows, by what was measured."""
    rows: list[Row] = about["rows"]
    versions = sorted({f"{row['library']} {row['version']}" for row in rows if row["library"] != "casemate"})
    lines = [
        "# Agreement with other libraries", "",
        "Made by `python benchmarks/agreement.py`: the same weights, images and settings; every result is judged by "
        "the model's own decisions inside the ball, and clean errors count as fallen. Times are CPU time of one "
        "thread, the library's over casemate's in the same seed, the median over seeds. "
        f"{', '.join(versions)}; torch {about['torch']}, {about['machine']}.",
    ]  # fmt: skip
    sections = {"left": left_section, "decisions": decisions_section, "norm": norm_section}
    for measure, section in sections.items():
        chosen = [row for row in rows if row["measure"] == measure]
        lines += ["", *section(chosen)] if chosen else []
    cases = {row["case"] for row in rows}
    facts = [f"- {fact}" for names, found in FACTS.items() if cases & set(names.split()) for fact in found]
    lines += ["", "## Where a library is wrong or other", "", *facts] if facts else []
    return "\n".join(lines) + "\n"


def groups(rows: list[Row]) -> list[dict[str, Row]]:
    """{library: row} for each case on each model and ball."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "case", "norm", "radius"))
        found.setdefault(key, {})[row["library"]] = row
    return list(found.values())


def head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def left_section(rows: list[Row]) -> list[str]:
    libraries = sorted({row["library"] for row in rows} - {"casemate"})
    lines = [
        "## Accuracy left", "",
        "Mean over seeds (lowest to highest); of a library then: how many points more casemate leaves, ± the "
        f"standard error over seeds, and the time. Goal: at most {100 * GOAL:g} points more. A difference above "
        f"the goal is **beyond noise** if it exceeds the goal by more than {ERRORS} standard errors. FAB-T draws no "
        "noise.", "",
        *head("model", "images", "seeds", "attack", "setting", "ball", "casemate", *libraries),
    ]  # fmt: skip
    for found in groups(rows):
        ours = found["casemate"]
        cells = [ours["model"], ours["images"], ours["seeds"] or "none", ours["case"], ours["setting"], _ball(ours)]
        cells.append(f"{_share(ours)}, {ours['seconds']:.1f} s")
        lines.append(line(*cells, *(_left(found.get(library)) for library in libraries)))
    return lines


def _left(row: Row | None) -> str:
    if row is None:
        return ""
    said = {"met": "", "noise": ", within noise", "above": ", **beyond noise**", "one seed": ", above, one seed"}
    error = "" if row["error"] is None else f" ± {100 * row['error']:.2f}"
    return f"{_share(row)}; {100 * row['above']:+.2f}{error}{said[verdict(row)]}; {row['times']:.2f} x"


def verdict(row: Row, errors: float = ERRORS) -> str:
    """`met` the goal; above it, `noise` or `above`; `one seed` of an attack that draws noise cannot tell."""
    if row["above"] <= GOAL + 1e-9:
        return "met"
    if row["seeds"] == 1:
        return "one seed"
    return "above" if row["above"] > GOAL + errors * (row["error"] or 0) else "noise"


def _share(row: Row) -> str:
    text = f"{100 * row['left']:.2f} %"
    return text if row["low"] == row["high"] else f"{text} ({100 * row['low']:.2f} to {100 * row['high']:.2f})"


def _ball(row: Row) -> str:
    return f"{row['norm']} {row['radius']:.4g}"


def decisions_section(rows: list[Row]) -> list[str]:
    lines = [
        "## Decisions image by image", "",
        "Without noise every image has one answer. Images that fall to one of both only, and how many of them lie on "
        "the boundary: a margin below 0.001 in either result. Goal: all of them.", "",
        *head("model", "images", "attack", "setting", "ball", "casemate leaves", "library", "leaves", "differ",
              "on the boundary", "time"),
    ]  # fmt: skip
    for found in groups(rows):
        ours = found.pop("casemate")
        for library, row in found.items():
            beyond = row["differ"] - row["boundary"]
            lines.append(line(
                row["model"], row["images"], row["case"], row["setting"], _ball(row),
                f"{100 * ours['left']:.2f} %, {ours['seconds']:.2f} s", library, f"{100 * row['left']:.2f} %",
                row["differ"], f"{row['boundary']}" + f" (**{beyond} not**)" * bool(beyond), f"{row['times']:.2f} x",
            ))  # fmt: skip
    return lines


def norm_section(rows: list[Row]) -> list[str]:
    lines = [
        "## Mean l2 norm", "",
        "C&W at equal settings, confidence 0: images felled of those that were right, and the mean distance over the "
        f"images that both have felled. Goal: casemate's at most {100 * (RATIO - 1):.0f} % longer.", "",
        *head("model", "images", "setting", "casemate fells", "library", "fells", "both", "casemate's norm",
              "the library's", "ratio", "time"),
    ]  # fmt: skip
    for found in groups(rows):
        ours = found.pop("casemate")
        for library, row in found.items():
            ratio = f"{row['ratio']:.4f}" if row["ratio"] <= RATIO else f"**{row['ratio']:.4f}**"
            lines.append(line(
                row["model"], row["images"], row["setting"], f"{ours['felled']} of {ours['right']}, "
                f"{ours['seconds']:.0f} s", library, row["felled"], row["both"], f"{row['norm_ours']:.4f}",
                f"{row['norm_mean']:.4f}", ratio, f"{row['times']:.2f} x",
            ))  # fmt: skip
    return lines
