"""The leaderboard as a picture, for a README."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.figure import Figure

from casemate.reporting import words
from casemate.reporting.leaderboard import Entry, Leaderboard
from casemate.reporting.theme import Draw, Theme

LINE, HEAD, FOOT = 34.0, 92.0, 18.0  # heights in points
COLUMNS = (("clean\naccuracy, %", 0.375), ("paper's\nprotocol, %", 0.47), ("adaptive,\ncore suite, %", 0.565))
GAP, VERDICT = 0.89, 0.905
BAR = (0.59, 0.2)  # left edge and width of the worst-case bars, as shares of the picture


def leaderboard_picture(board: Leaderboard) -> Draw:
    """Ranks, systems, clean accuracy, the paper's protocol, adaptive worst cases with bars, gap and verdict."""

    def draw(theme: Theme, width: int) -> Figure:
        height = HEAD + LINE * (len(board.entries) + 1) + FOOT
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(height, 0))
        axes.axis("off")
        first = board.entries[0] if board.entries else None
        where = f"{words.dataset(first.dataset)}, {words.threat(first.threat)}" if first else board.profile
        axes.text(0.025, 30, where, fontsize=17, fontweight="bold", color=theme.ink, va="center")
        said = "\n".join(textwrap.wrap(words.finding(board), 150))
        axes.text(0.025, 50, said, fontsize=10.5, color=theme.muted, va="top", linespacing=1.45)
        _header(axes, HEAD + LINE / 2, theme)
        for at, entry in enumerate(board.entries):
            _line(axes, HEAD + LINE * (at + 1.5), entry, theme)
        return figure

    return draw


def _header(axes: Any, y: float, theme: Theme) -> None:
    titles = [
        ("system", 0.07, "left"), *((name, x, "right") for name, x in COLUMNS),
        ("adaptive,\nall attacks, %", BAR[0], "left"), ("gap,\npoints", GAP, "right"), ("verdict", VERDICT, "left"),
    ]  # fmt: skip
    for title, x, side in titles:
        for up, part in enumerate(reversed(title.split("\n"))):
            axes.text(x, y + 8 - 13 * up, part, fontsize=9.5, color=theme.muted, ha=side, va="baseline")
    axes.plot([0.025, 0.985], [y + LINE / 2] * 2, color=theme.ink, linewidth=1.0)


def _line(axes: Any, y: float, entry: Entry, theme: Theme) -> None:
    ink = theme.ink if entry.rank is not None else theme.muted
    look = {"fontsize": 11.5, "color": ink, "va": "center"}
    weight = "bold" if entry.champion else "normal"
    axes.text(0.045, y, str(entry.rank or "–"), ha="right", **look)
    axes.text(0.07, y, entry.system, fontweight=weight, **look)
    values = (entry.clean, entry.published, entry.worst_core)
    for (_, x), value in zip(COLUMNS, values, strict=True):
        axes.text(x, y, words.percent(value), ha="right", **look)
    if entry.worst_all is not None:
        _bar(axes, y, entry, theme)
    axes.text(GAP, y, words.points(entry.gap), ha="right", **look)
    verdict = entry.verdict if entry.status == "ranked" else entry.status
    axes.text(VERDICT, y, verdict, fontsize=10, color=ink, va="center")
    axes.plot([0.025, 0.985], [y + LINE / 2] * 2, color=theme.line, linewidth=0.8)


def _bar(axes: Any, y: float, entry: Entry, theme: Theme) -> None:
    left, width = BAR
    value = entry.worst_all or 0.0
    colour = theme.adaptive if entry.rank is not None else theme.clean
    axes.barh(y, width, left=left, height=12, color=theme.line, alpha=0.5)
    axes.barh(y, width * value, left=left, height=12, color=colour)
    if entry.worst_all_low is not None and entry.worst_all_high is not None:
        ends = [left + width * entry.worst_all_low, left + width * entry.worst_all_high]
        axes.plot(ends, [y, y], color=theme.ink, linewidth=1.4, solid_capstyle="butt")
    weight, ink = ("bold" if entry.champion else "normal"), (theme.muted if entry.rank is None else theme.ink)
    look = {"fontsize": 11.5, "fontweight": weight, "color": ink, "va": "center", "ha": "right"}
    axes.text(left + width + 0.045, y, words.percent(value), **look)
