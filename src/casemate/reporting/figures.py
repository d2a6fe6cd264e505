"""The plots: worst-case bars, accuracy against radius, training curves, attack x defense heat map.

Each function gives a `Draw`, which is drawn once as PNG and once as SVG for the page, at any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from casemate.reporting.heatmap import HeatMap
from casemate.reporting.inputs import ReportInputs, Row
from casemate.reporting.leaderboard import Entry
from casemate.reporting.theme import DASHES, MARKERS, Draw, Theme, canvas
from casemate.reporting.words import NORMS

DARK = 0.7
"""Above this accuracy a cell of the heat map is dark enough for light text."""
PHONE = 420
"""Below this width in points a figure stacks its panels."""


def worst_bars(entries: Sequence[Entry]) -> Draw:
    """Clean accuracy, paper's protocol and adaptive worst case of each entry, as bars with 95 % intervals."""

    def draw(theme: Theme, width: int) -> Figure:
        figure = canvas(width, 70 + 40 * len(entries))
        axes = figure.subplots()
        for y, entry in enumerate(entries):
            faces = [
                ("clean", entry.clean, entry.clean_low, entry.clean_high, theme.clean),
                ("published", entry.published, entry.published_low, entry.published_high, theme.static),
                ("adaptive", entry.worst_all, entry.worst_all_low, entry.worst_all_high, theme.adaptive),
            ]
            shown = [f for f in faces if f[1] is not None]
            for place, (_, value, low, high, colour) in enumerate(shown):
                _bar(axes, y + 0.25 * (place - (len(shown) - 1) / 2), value or 0.0, low, high, colour, theme)
        names = [e.system if e.rank is not None else f"{e.system}\n({e.status})" for e in entries]
        axes.set_yticks(range(len(entries)), names)
        for tick, entry in zip(axes.get_yticklabels(), entries, strict=True):
            tick.set_color(theme.muted if entry.rank is None else theme.ink)
        axes.set_ylim(len(entries) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20 if width > PHONE else 50))
        axes.set_xlabel("accuracy, %")
        handles = [_patch(c) for c in (theme.clean, theme.static, theme.adaptive)]
        roles = ["clean", "paper's protocol", "adaptive worst case"]
        if all(e.published is None for e in entries):
            del handles[1], roles[1]
        _legend(figure, handles, roles, 3 if width > PHONE else 2)
        return figure

    return draw


def _bar(axes: Any, y: float, value: float, low: float | None, high: float | None, colour: str, theme: Theme) -> None:
    axes.barh(y, 100 * value, height=0.22, color=colour)
    if low is not None and high is not None:
        axes.plot([100 * low, 100 * high], [y, y], color=theme.ink, linewidth=1.2, solid_capstyle="butt")
    end = 100 * max(value, high or 0.0)
    axes.text(end + 1.2, y, f"{100 * value:.1f}", va="center", fontsize=9.5, color=theme.ink)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    figure.legend(
        handles, names, loc="outside lower left", ncols=columns, handlelength=1.6, columnspacing=1.4, borderpad=0.2
    )


def series_styles(inputs: ReportInputs) -> dict[str, tuple[int, int]]:
    """(colour index, dash index) of each system: a row has a colour, its inference modes have dashes."""
    return {
        system.name: (row_at % len(Theme.series), mode_at % len(DASHES))
        for row_at, row in enumerate(inputs.rows)
        for mode_at, system in enumerate(row.evaluation.systems)
    }


def radius_curves(inputs: ReportInputs) -> Draw | None:
    """Robust accuracy against the radius with interval bands; None if no system was swept."""
    swept = [(s.name, s.sweep) for row in inputs.rows for s in row.evaluation.systems if s.sweep is not None]
    if not swept:
        return None
    styles, threat = series_styles(inputs), inputs.rows[0].evaluation.threat
    grey_levels = "/255" in threat.text
    unit = 255.0 if grey_levels else 1.0

    def draw(theme: Theme, width: int) -> Figure:
        figure = canvas(width, max(360, min(470, 70 + 40 * len(swept))))
        axes = figure.subplots()
        for name, sweep in swept:
            row_at, mode_at = styles[name]
            x, colour = np.array(sweep.radii) * unit, theme.series[row_at]
            low, high = 100 * np.array(sweep.low), 100 * np.array(sweep.high)
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(
                x, 100 * np.array(sweep.accuracy), color=colour, linestyle=DASHES[mode_at],
                marker=MARKERS[row_at % len(MARKERS)], label=name, clip_on=False,
            )  # fmt: skip
        axes.axvline(threat.radius * unit, color=theme.ink, linewidth=1.0, linestyle=(0, (2, 3)))
        axes.text(threat.radius * unit, 103, "threat model", ha="center", fontsize=9.5, color=theme.muted)
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        axes.set_xlabel(
            f"radius ({NORMS.get(threat.norm, threat.norm)}{', in 1/255' if grey_levels else ', pixel units'})"
        )
        axes.set_ylabel("robust accuracy, %")
        handles, names = axes.get_legend_handles_labels()
        _legend(figure, handles, names, 3 if width > PHONE else 2)
        return figure

    return draw


def training_curves(inputs: ReportInputs) -> Draw | None:
    """Loss, and validation accuracy clean and robust, per epoch; None if no row has curves."""
    rows = [(at, row) for at, row in enumerate(inputs.rows) if row.curves.get("epoch")]
    if not rows:
        return None

    def draw(theme: Theme, width: int) -> Figure:
        stacked = width <= PHONE
        figure = canvas(width, 560 if stacked else 340)
        losses, accuracies = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
        for at, row in rows:
            colour, marker = theme.series[at % len(theme.series)], MARKERS[at % len(MARKERS)]
            look = {"color": colour, "marker": marker, "markersize": 3.5}
            loss = next((name for name in row.curves if "loss" in name), None)
            if loss is not None:
                losses.plot(*_points(row, loss), label=row.name, **look)
            accuracies.plot(*_points(row, "val_robust", 100), label=row.name, **look)
            accuracies.plot(*_points(row, "val_clean", 100), linestyle=DASHES[2], **look)
        losses.set(title="Training loss", xlabel="epoch")
        accuracies.set(title="Validation accuracy, %", xlabel="epoch", ylim=(0, 102))
        for axes in (losses, accuracies):
            axes.xaxis.get_major_locator().set_params(integer=True)
        handles, names = accuracies.get_legend_handles_labels()
        handles += [_line(theme.muted, "-"), _line(theme.muted, DASHES[2])]
        _legend(figure, handles, [*names, "robust", "clean"], 2 if stacked else 5 if width < 900 else 8)
        return figure

    return draw


def _points(row: Row, column: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    pairs = zip(row.curves["epoch"], row.curves.get(column, []), strict=False)
    known = [(x, scale * y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _line(colour: str, dash: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=dash)


def heat_figure(heat: HeatMap) -> Draw:
    """The attack x defense heat map: robust accuracy in every cell, adaptive and static side by side."""

    def draw(theme: Theme, width: int) -> Figure:
        columns = [(g.system, face) for g in heat.groups for face in g.faces]
        values = np.array([[np.nan if c is None else c.accuracy for c in line.cells] for line in heat.lines])
        figure = canvas(max(width, 130 + 64 * len(columns)), 96 + 26 * len(heat.lines))
        axes = figure.subplots()
        shades = LinearSegmentedColormap.from_list("heat", [theme.surface, theme.heat])
        axes.pcolormesh(values, cmap=shades, vmin=0, vmax=1.1, edgecolors=theme.surface, linewidth=2)
        for y, x in np.argwhere(~np.isnan(values)):
            ink = theme.surface if values[y, x] > DARK else theme.ink
            axes.text(
                x + 0.5, y + 0.5, f"{100 * values[y, x]:.1f}", ha="center", va="center", color=ink, fontsize=9.5
            )
        axes.set_yticks(np.arange(len(heat.lines)) + 0.5, [line.attack for line in heat.lines], color=theme.ink)
        names = [f"{name}\n{face}" if face else name for name, face in columns]
        axes.set_xticks(np.arange(len(columns)) + 0.5, names, color=theme.ink, fontsize=9.5, rotation=35, ha="left")
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        return figure

    return draw
