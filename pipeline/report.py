"""Stage report: the leaderboard, the plots, the page, and the champion.

python -m pipeline.report
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common import STATE, md5, recording, stage, write_json

if TYPE_CHECKING:
    from casemate.params import Params
    from casemate.reporting.leaderboard import Entry


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.reporting import Leaderboard, ReportInputs, champion, write_overview, write_report

    reports = params.reports_dir
    inputs = ReportInputs.load(params.profile, reports, params.models_dir, params.evaluate.models, params.notes)
    page = write_report(inputs, reports)
    write_overview(reports.parent)
    best = champion(Leaderboard.read(reports / "leaderboard.json"))
    model = crown(params, best)
    with recording(params, "report") as recorder:
        recorder.artifact(page)
        recorder.output(reports / "leaderboard.json")
    register(params, best, model)


def crown(params: Params, best: Entry | None) -> Path | None:
    """Put the champion's released file, its cards and what it is into `models/<profile>/champion`; returns the file.

    A file that did not pass the release gate is none: `reporting.champion` leaves it out.
    """
    folder = params.models_dir / "champion"
    temporary = folder.with_name(".champion.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    source = None if best is None else params.models_dir / "released" / best.row / best.mode
    model = source / "model.onnx" if source is not None and source.exists() else None
    if model is not None:
        shutil.copytree(model.parent, temporary, dirs_exist_ok=True)
    write_json(temporary / "champion.json", {
        "champion": best.system if best else None, "exported": model is not None,
        **({k: getattr(best, k) for k in KEPT} if best else {}),
        "md5": md5(model) if model else None,
    })  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return model


KEPT = (
    "row", "mode", "method", "dataset", "network", "threat", "clean", "worst_core", "worst_core_low",
    "worst_core_high", "worst_core_n", "worst_all", "worst_all_low", "worst_all_high", "worst_all_n", "budget",
    "release", "served", "selection", "selection_n",
)  # fmt: skip


def register(params: Params, best: Entry | None, model: Path | None) -> None:
    """Move the alias `champion` in the MLflow registry; a store that cannot be reached costs a warning."""
    from casemate import model_registry, tracking
    from casemate.errors import first_line

    name = f"casemate-{params.profile}"
    try:
        version = model_registry.set_champion(
            STATE / "mlflow", params.tracking.experiment, name, md5(model) if model else None
        )
    except Exception as error:  # a log must not cost a report, whatever its client raises
        tracking.warn(f"the alias 'champion' was not moved: {type(error).__name__}: {first_line(error)}")
        return
    if best is None:
        print("no system earns the alias 'champion': none is ranked with a sound evaluation")
    elif version is None:
        print(f"champion: {best.system}; it is not in the MLflow registry of this machine")
    else:
        print(f"champion: {best.system}, models:/{name}@champion is version {version}")


def print_summary() -> None:
    """Where the results are and what they say, after `dvc repro`."""
    from rich.console import Console
    from rich.table import Table

    from casemate.params import load_params
    from casemate.reporting import Leaderboard

    params = load_params(Path("params.yaml"))
    board = Leaderboard.read(params.reports_dir / "leaderboard.json")
    title = f"{params.profile}: accuracy left by the worst of the core suite, and of all"
    table = Table(title=title, title_justify="left")
    for column in ("", "system", "clean", "core", "n", "all", "n", "verdict"):
        table.add_column(column, justify="left" if column in ("system", "verdict") else "right", no_wrap=True)
    for entry in board.entries:
        table.add_row(
            "" if entry.rank is None else str(entry.rank), entry.system + (" *" if entry.champion else ""),
            percent(entry.clean), percent(entry.worst_core), count(entry.worst_core_n), percent(entry.worst_all),
            count(entry.worst_all_n), entry.status if entry.rank is None else entry.verdict,
        )  # fmt: skip
    Console().print(table)
    print(f"* champion: {params.models_dir}/champion/model.onnx")
    print(f"report:     {params.reports_dir}/index.html")
    print("next:       .venv/bin/python -m pipeline ui   (compare the runs in MLflow)")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


if __name__ == "__main__":
    stage(run, doc=__doc__)
