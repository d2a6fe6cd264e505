"""Pictures of the study of the internal Wasserstein distance, from what `casemate.evaluation.study` wrote."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from casemate.errors import UserError
from casemate.reporting.theme import DASHES, MARKERS, Draw, Theme, canvas, save_png

WIDTH = 900
TITLE = 30  # letters on a line above a panel
COLOURS = 64
NAMES = {"linf": "linf", "l2": "l2", "mean_abs": "mean |difference|"}


def pictures(path: Path, folder: Path) -> list[Path]:
    """Write the PNG files of a study's JSON: `distances-<model>.png` for each model with distances, and
    `ablation-<option>.png`. Returns them. Raises UserError if the file is none of ours."""
    try:
        content = json.loads(path.read_text())
        figures, ablations = content["figures"], content["ablations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the JSON of a study ({error})") from None
    drawn = {f"distances-{plain(model)}.png": distance_figure(found) for model, found in figures.items() if found}
    for table in ablations:
        drawn[f"ablation-{plain(table['option'])}.png"] = ablation_figure(table)
    for name, draw in drawn.items():
        save_png(draw, folder / name, WIDTH)
        lighten(folder / name)
    return [folder / name for name in drawn]


def lighten(path: Path) -> None:
    """Few colours: a figure of lines needs no more, and these files are committed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
    temporary.replace(path)


def distance_figure(found: Mapping[str, Any]) -> Draw:
    """A panel for each distance, a line of steps for each attack (n in the legend), and a rule at its median."""

    def draw(theme: Theme, width: int) -> Figure:
        columns = min(3, len(found))
        rows = -(-len(found) // columns)
        figure = canvas(width, 60 + 220 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, panel) in zip(panels, found.items(), strict=False):
            for at, (attack, values) in enumerate(panel["attacks"].items()):
                if not values["n"]:
                    continue
                look = {"color": theme.series[at % len(theme.series)], "linestyle": DASHES[at % len(DASHES)]}
                axes.stairs(
                    values["density"], panel["edges"], label=f"{attack} (n = {values['n']})", linewidth=1.6, **look
                )
                axes.axvline(values["median"], linewidth=0.8, **look)
            axes.set(title=textwrap.fill(NAMES.get(name, name), TITLE), ylabel="share of successes")
            if panel["log"]:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")
        for axes in panels[len(found) :]:
            axes.axis("off")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=4, handlelength=1.6)
        return figure

    return draw


def ablation_figure(table: Mapping[str, Any]) -> Draw:
    """Success rate with its interval, and accuracy clean and attacked, against the option's value; one place for each
    value, as the values of an ablation are powers of something, and zero."""

    def draw(theme: Theme, width: int) -> Figure:
        figure = canvas(width, 320)
        left, right = figure.subplots(1, 2)
        values = sorted({row["value"] for row in table["rows"]})
        place = {value: at for at, value in enumerate(values)}
        series: dict[str, list[dict[str, Any]]] = {}
        for row in table["rows"]:
            series.setdefault(f"{row['model']}, {row['attack']}", []).append(row)
        for at, (name, rows) in enumerate(series.items()):
            rows = [row for row in rows if row["asr"] is not None]
            x, colour = [place[row["value"]] for row in rows], theme.series[at % len(theme.series)]
            look = {"color": colour, "marker": MARKERS[at % len(MARKERS)]}
            low, high = ([100 * row[end] for row in rows] for end in ("low", "high"))
            left.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            left.plot(x, [100 * row["asr"] for row in rows], label=name, **look)
            right.plot(x, [100 * row["accuracy"] for row in rows], **look)
            right.plot(x, [100 * row["clean_accuracy"] for row in rows], linestyle=DASHES[2], **look)
        left.set(title="Success of the attack, %", ylim=(0, 102))
        right.set(title="Accuracy attacked (line) and clean (dots), %", ylim=(0, 102))
        for axes in (left, right):
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axes.set_xlabel(table["option"])
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=3, handlelength=1.6)
        return figure

    return draw


def plain(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
