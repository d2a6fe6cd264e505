"""The report: leaderboard files, plots, and one self-contained page per profile; an overview of all profiles.

Nothing written holds a date, a path or a run id, so equal inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from casemate.errors import UserError
from casemate.reporting import figures, words
from casemate.reporting.gallery import Gallery, gallery, gallery_figure
from casemate.reporting.heatmap import heat_map
from casemate.reporting.inputs import ReportInputs, Row
from casemate.reporting.leaderboard import Leaderboard, build, champion, protocol
from casemate.reporting.picture import leaderboard_picture
from casemate.reporting.seeds import over_seeds
from casemate.reporting.theme import WIDE, Draw, inline_svg, save_png, write_bytes

HIDDEN_CARD_KEYS = frozenset({"classes"})
PNG_WIDTH = 760
FULL = 1080
"""Width in points of a figure as wide as the page."""


def write_report(inputs: ReportInputs, out: Path) -> Path:
    """Write leaderboard.json, .csv and .png, plots/*.png and index.html into `out`; returns the page's path.

    Raises UserError, with nothing written, if the rows cannot share a leaderboard or images cannot be read.
    """
    board = build(inputs)
    galleries = {row.name: _gallery(row) for row in inputs.rows if row.gallery is not None}
    shown = {name: found for name, found in galleries.items() if found is not None}
    draws = _draws(inputs, board)
    page = _page(inputs, board, draws, shown)
    _write_pngs(out / "plots", {**draws, **{f"gallery_{name}": gallery_figure(g) for name, g in shown.items()}})
    save_png(leaderboard_picture(board), out / "leaderboard.png", 1000)
    write_bytes(out / "leaderboard.csv", board.csv().encode())
    write_bytes(out / "leaderboard.json", board.json().encode())
    write_bytes(out / "index.html", page.encode())
    return out / "index.html"


def write_overview(reports: Path, default: str = "mnist") -> Path:
    """Write `reports`/index.html: the leaderboards of every profile found there, `default` (or else the first) in
    full at the top. Raises UserError if there is none."""
    boards = [Leaderboard.read(p) for p in sorted(reports.glob("*/leaderboard.json"))]
    if not boards:
        raise UserError(f"{reports} holds no leaderboard: run the report stage first")
    boards.sort(key=lambda b: (b.profile != default, b.profile))
    bars = [inline_svg(figures.worst_bars(b.entries), f"bars-{i}", _BARS) for i, b in enumerate(boards[:1])]
    page = _environment().get_template("overview.html.j2").render(
        boards=[(board, words.finding(board), champion(board)) for board in boards], bars=bars[0],
        remarks=words.remarks(boards[0]), seeds=over_seeds(boards),
    )  # fmt: skip
    write_bytes(reports / "index.html", page.encode())
    return reports / "index.html"


_BARS = "Bars of clean accuracy, of what the paper's protocol leaves, and of the adaptive worst case of each system"


def _gallery(row: Row) -> Gallery | None:
    assert row.gallery is not None
    threat = row.evaluation.threat
    return gallery(row.gallery, row.evaluation.classes, threat.radius if threat.norm == "linf" else 0.0)


def _draws(inputs: ReportInputs, board: Leaderboard) -> dict[str, Draw]:
    measured = [e for e in board.entries if e.clean is not None]
    heat = heat_map(inputs, board.entries)
    found = {
        "worst_case": figures.worst_bars(measured) if measured else None,
        "radius": figures.radius_curves(inputs),
        "curves": figures.training_curves(inputs),
        "heatmap": figures.heat_figure(heat) if heat.groups else None,
    }
    return {name: draw for name, draw in found.items() if draw is not None}


def _write_pngs(folder: Path, draws: Mapping[str, Draw]) -> None:
    """The plots, and no plot of a row that is gone."""
    for name, draw in draws.items():
        save_png(draw, folder / f"{name}.png", PNG_WIDTH)
    for old in folder.glob("*.png"):
        if old.stem not in draws:
            old.unlink()


def _page(inputs: ReportInputs, board: Leaderboard, draws: Mapping[str, Draw], shown: Mapping[str, Gallery]) -> str:
    labels = {
        "worst_case": _BARS,
        "radius": "Robust accuracy against the radius, one line per system with its 95 % interval",
        "curves": "Training loss, and validation accuracy clean and robust, per epoch",
    }
    evaluations = [row.evaluation for row in inputs.rows]
    return _environment().get_template("report.html.j2").render(
        board=board, rows=inputs.rows, threat=evaluations[0].threat, dataset=evaluations[0].dataset,
        finding=words.finding(board), remarks=words.remarks(board), warning=words.scaled_down(evaluations),
        heat=heat_map(inputs, board.entries), failed_fits=inputs.failed_fits, dark=figures.DARK, galleries=shown,
        detections=inputs.detections, study=inputs.study, transfer=inputs.transfer,
        entries={e.system: e for e in board.entries},
        protocols={s.name: protocol(e, s) for e in evaluations for s in e.systems},
        plots={name: inline_svg(draws[name], name, label, FULL if name == "curves" else WIDE)
            for name, label in labels.items()
            if name in draws
        },
        facts=_facts(inputs), cards={row.name: flat(_without(row.evaluation.card)) for row in inputs.rows},
        metrics={row.name: flat(row.train) for row in inputs.rows}, notes=inputs.notes,
    )  # fmt: skip


def _facts(inputs: ReportInputs) -> list[tuple[str, str]]:
    evaluations = [row.evaluation for row in inputs.rows]
    rates = [s.clean.n for e in evaluations for s in e.systems if s.clean is not None]
    attacks = {(c.suite, c.attack) for e in evaluations for s in e.systems for c in s.cells}
    networks = sorted({e.network for e in evaluations})
    seeds = sorted({e.card["seed"] for e in evaluations if e.card.get("seed") is not None})
    found = [
        ("Dataset", words.dataset(evaluations[0].dataset)),
        ("Network", ", ".join(networks)),
        ("Threat model", words.threat(evaluations[0].threat.text)),
        ("Test images", words.count(max(rates)) if rates else "–"),
        ("Attacks", str(len(attacks))),
        ("Training seed" if len(seeds) < 2 else "Training seeds", ", ".join(map(str, seeds)) or "–"),
        ("Budget", ", ".join(f"{b:g}" for b in sorted({e.budget for e in evaluations}))),
    ]
    return found


def _without(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key not in HIDDEN_CARD_KEYS}


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as `a.b` keys, in the order given."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("casemate", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        percent=words.percent, points=words.points, count=words.count, figure=words.figure,
        interval=words.interval, dataset_name=words.dataset, threat_name=words.threat, breakable=breakable,
        number=partial("{:g}".format), anchor=anchor, tight=words.tight,
    )  # fmt: skip
    return environment


def breakable(name: str) -> Markup:
    """A name that may wrap after `_`, `+`, `/` and `.`, each part escaped."""
    cuts = [0, *(i + 1 for i, sign in enumerate(name) if sign in "_+/."), len(name)]
    return Markup("<wbr>").join(name[a:b] for a, b in pairwise(cuts) if b > a)


def anchor(name: str) -> str:
    """A name as a fragment identifier: other characters than letters and digits by their number."""
    return "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in name)
