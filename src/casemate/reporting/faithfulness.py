"""`docs/faithfulness.md`: for each method the published figures beside those of the committed reports."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from casemate.registry import names
from casemate.reporting.inputs import ReportInputs
from casemate.reporting.leaderboard import Entry, build

HEAD = """# Published figures beside ours

Made by `python -m pipeline faithfulness` from `src/casemate/published.yaml` and the reports in `reports/`. Per cent.

Published figures were made on other networks, by longer trainings and mostly under weaker attacks, so the two stand
beside each other to be read, not to be compared digit by digit. Ours are adaptive worst cases per image, each with
its number of images: **core** first, then every attack that ran. Scaled-down runs are marked. Where a method is in no
committed report, what is said to differ are the settings of its row in the profile `mnist_all`.

A figure marked *unverified* is repeated from general knowledge and was not checked against its source.
"""
ROW = "| {} | {} | {} | {} | {} | {} | {} |"
UNVERIFIED = "unverified"
UNKNOWN = "No published figure of it is recorded here."
COLUMNS = ("from", "data", "network", "threat model", "clean", "robust", "protocol")


class Published(BaseModel):
    """One published figure; accuracies in per cent, `clean` None where it is not told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    data: str
    network: str
    threat: str
    clean: float | None
    robust: float
    protocol: str
    unverified: bool = False
    """Repeated from general knowledge: nobody has looked it up for this page."""


class Method(BaseModel):
    """What is known of one method: its title, what was published, what differs here and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    published: tuple[Published, ...]
    note: str = Field(min_length=1)


@dataclass(frozen=True)
class Ours:
    """One ranked or unranked system of one committed report."""

    profile: str
    entry: Entry


def published() -> dict[str, dict[str, Method]]:
    """Kind ("defenses", "detectors") -> registered name -> what was published."""
    text = importlib.resources.files("casemate").joinpath("published.yaml").read_text()
    return {
        kind: {name: _method(about) for name, about in methods.items()}
        for kind, methods in yaml.safe_load(text).items()
    }


def _method(about: dict[str, object]) -> Method:
    figures = about.pop("published")
    assert isinstance(figures, list)
    return Method.model_validate({**about, "published": [_row(row) for row in figures]})


def _row(row: list[object]) -> dict[str, object]:
    """The fields in their order, and the word `unverified` or nothing after them."""
    *fields, _ = Published.model_fields
    marks = row[len(fields) :]
    if marks not in ([], [UNVERIFIED]):
        raise ValueError(f"published.yaml: after the {len(fields)} fields of a figure may stand {UNVERIFIED}: {row}")
    return {**dict(zip(fields, row, strict=False)), "unverified": bool(marks)}


def page(reports: Path) -> str:
    """The whole page, from every profile under `reports` that was evaluated."""
    inputs = {
        folder.parent.name: ReportInputs.load(folder.parent.name, folder.parent, Path("models") / folder.parent.name)
        for folder in sorted(reports.glob("*/evaluate"))
    }
    ours = [Ours(profile, entry) for profile, found in inputs.items() for entry in build(found).entries]
    known = published()
    lines = [HEAD, "## Defenses", ""]
    for name, method in _all(known["defenses"], "defense").items():
        lines += _defense(name, method, [found for found in ours if found.entry.method == name])
    lines += ["## Detectors", ""]
    for name, method in _all(known["detectors"], "detector").items():
        lines += _detector(name, method, inputs.values())
    return "\n".join(lines).rstrip() + "\n"


def _all(known: Mapping[str, Method], kind: str) -> dict[str, Method]:
    """Those of published.yaml, in its order, then the registered ones that it does not name."""
    others = {name: Method(title=name, published=(), note=UNKNOWN) for name in names(kind) if name not in known}
    return {**known, **others}


def _defense(name: str, method: Method, ours: Sequence[Ours]) -> list[str]:
    return _section(name, method, [_ours(found) for found in ours])


def _section(name: str, method: Method, ours: list[str]) -> list[str]:
    theirs = [
        ROW.format(
            p.where + (f" *({UNVERIFIED})*" if p.unverified else ""), p.data, p.network, p.threat, _figure(p.clean),
            _figure(p.robust), p.protocol,
        )
        for p in method.published
    ]  # fmt: skip
    table = [ROW.format(*COLUMNS), ROW.format(*["---"] * len(COLUMNS)), *theirs, *ours, ""] if theirs or ours else []
    missing = [] if ours else ["Not in a committed report.", ""]
    return [f"### {method.title} (`{name}`)", "", *table, *missing, " ".join(method.note.split()), ""]


def _ours(found: Ours) -> str:
    entry = found.entry
    robust = [f"**{_share(entry.worst_core)}** (n {entry.worst_core_n:,})"] if entry.worst_core_n else ["-"]
    if entry.worst_all_n:
        robust.append(f"{_share(entry.worst_all)} (n {entry.worst_all_n:,})")
    protocol = f"core; every attack ({entry.attacks}); {entry.status}"
    if entry.published_n:
        theirs = f"`{entry.published_attack}` (n {entry.published_n:,})"
        protocol += f"; {_share(entry.published)} by the strongest a paper would report, {theirs}"
    trained = f"{entry.effective_epochs:g} epochs, seed {entry.train_seed}" if entry.effective_epochs else "-"
    scaled = "" if entry.budget == 1 else f", budget {entry.budget:g}"
    return ROW.format(
        f"ours, `{found.profile}` {entry.system}", entry.dataset, f"{entry.network}, {trained}{scaled}", entry.threat,
        _share(entry.clean), ", ".join(robust), protocol,
    )  # fmt: skip


def _detector(name: str, method: Method, inputs: Iterable[ReportInputs]) -> list[str]:
    lines = []
    for report in inputs:
        for found in report.detections:
            mine = {label for label, spec in found.detectors.items() if spec.get("method") == name}
            for row in found.rows:
                if row.detector in mine and row.familiar and row.own and row.scope == "all":
                    lines.append(ROW.format(
                        f"ours, `{report.profile}` {row.detector} behind {found.row}", "", found.network,
                        "familiar attack", "-", f"**{_share(row.acc_nadv)}** (n {row.n_natural:,})",
                        f"ACC-NADV fitted to {row.tested_on}; AUROC {row.auroc:.3f}",
                    ))  # fmt: skip
    return _section(name, method, lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
