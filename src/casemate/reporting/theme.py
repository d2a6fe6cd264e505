"""How figures look and are written: a palette for PNG files, and SVG that follows the colours of the page.

Series colours are Okabe and Ito's (2008), told apart with any colour vision; line style and marker repeat the
distinction. An SVG is drawn in placeholder colours, each replaced by a CSS variable of `style.css`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

DPI = 160
WIDE, NARROW = 560, 350
"""Usual widths in CSS pixels (= points of the figure) of the two forms of an inline figure: desktop and phone."""


@dataclass(frozen=True)
class Theme:
    """Colours by role. `clean`, `static` and `adaptive` are the three faces a bar chart compares."""

    surface: str = "#ffffff"
    ink: str = "#1d2530"
    muted: str = "#5d6875"
    line: str = "#d9dde3"
    clean: str = "#a9b3bf"
    static: str = "#e08a1e"
    adaptive: str = "#0b62a4"
    heat: str = "#084a80"
    series: tuple[str, ...] = (
        "#0072b2", "#d55e00", "#009e73", "#b85c95", "#c98a00", "#3f9bd1", "#7a5195", "#55606e",
    )  # fmt: skip


LIGHT = Theme()
ROLES = ("surface", "ink", "muted", "line", "clean", "static", "adaptive", "heat")
VARIABLES = (*ROLES, *(f"series-{i}" for i in range(len(LIGHT.series))))
PLACEHOLDERS = {name: f"#fe01{i:02x}" for i, name in enumerate(VARIABLES)}
PAGE = Theme(
    **{role: PLACEHOLDERS[role] for role in ROLES},
    series=tuple(PLACEHOLDERS[f"series-{i}"] for i in range(len(LIGHT.series))),
)
"""Placeholder colours, for figures that `inline_svg` writes."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vPXh"

Draw = Callable[[Theme, int], Figure]
"""A figure drawn in a theme, at a width in points."""


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Matplotlib set to the theme, and to text that is never read as mathematics (names hold `_` and `$`)."""
    settings: dict[str, Any] = {
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "casemate", "font.size": 11,
        "font.family": ["DejaVu Sans"], "text.color": theme.ink, "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted, "axes.labelsize": 11, "axes.titlesize": 11.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.linewidth": 1.0, "axes.spines.top": False, "axes.spines.right": False,
        "axes.facecolor": "none", "axes.grid": True, "axes.axisbelow": True, "grid.color": theme.line,
        "grid.linewidth": 0.8, "xtick.color": theme.line, "ytick.color": theme.line, "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "xtick.major.size": 0,
        "ytick.major.size": 0, "xtick.major.pad": 7, "ytick.major.pad": 6,
        "legend.frameon": False, "legend.fontsize": 10.5, "figure.facecolor": theme.surface,
        "lines.linewidth": 2.0, "lines.markersize": 4.5,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def canvas(width: int, height: float) -> Figure:
    """An empty figure of `width` x `height` points, its parts laid out so that none overlaps."""
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05)
    return Figure(figsize=(width / 72, height / 72), layout=layout)


def save_png(draw: Draw, path: Path, width: int) -> None:
    """The figure as a PNG file without metadata: equal bytes for equal inputs."""
    stream = io.BytesIO()
    with drawing(LIGHT):
        draw(LIGHT, width).savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, stream.getvalue())


def inline_svg(draw: Draw, name: str, label: str, wide: int = WIDE) -> Markup:
    """The figure as two `<svg>` elements, `wide` and NARROW points across, in the colours and font of the page.

    The style sheet shows the one that suits the screen. `name` keeps the identifiers inside apart from those of
    other figures; `label` is read to who cannot see it.
    """
    forms = [("wide", wide), ("narrow", NARROW)]
    return Markup("\n").join(_svg(draw, f"{name}-{form}", form, width, label) for form, width in forms)


def _svg(draw: Draw, name: str, form: str, width: int, label: str) -> Markup:
    stream = io.StringIO()
    with drawing(PAGE):
        draw(PAGE, width).savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = stream.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", box.end()) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), body)
    head = Markup('<svg class="{}" viewBox="{}" role="img" aria-label="{}">')
    return head.format(form, box.group(1), label) + Markup(body)  # nosec: matplotlib escapes the names it draws


def _tag(tag: str, name: str) -> str:
    """One tag of an SVG: identifiers made unique, colours and font those of the page, digits nobody sees dropped."""
    tag = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', tag)
    tag = tag.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", tag)
    tag = re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag)
    for variable, placeholder in PLACEHOLDERS.items():
        tag = tag.replace(placeholder, f"var(--{variable})")
    return tag


_METADATA = ("Creator", "Date", "Format", "Type")


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
