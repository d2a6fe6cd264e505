"""The command `casemate`: what exists, and how robust a model of your own is. Nothing heavy is imported up here."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casemate import registry
from casemate.cli_serving import app as serving
from casemate.errors import UserError, check_file, check_folder, near, one_line_errors
from casemate.fields import check_radius, fraction

if TYPE_CHECKING:
    from casemate.evaluation.bring import Request
    from casemate.evaluation.ledger import Ledger
    from casemate.evaluation.plan import Progress
    from casemate.evaluation.schema import EvaluateParams
    from casemate.threat import ThreatModel

app = typer.Typer(
    help="Train robust image classifiers, attack them as hard as anyone can, ship the survivors.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
app.add_typer(serving)
KINDS = {
    "attacks": "attack", "defenses": "defense", "detectors": "detector", "networks": "network", "datasets": "dataset",
}  # fmt: skip
NOT_ATTACKED = "no attack was run on this model: its clean accuracy says nothing of its robustness"
BLACK_BOX = "the model offers no gradient: only black-box attacks were run, so the accuracy left is an upper bound"
MASKED = "the masking gate failed: the gradients mislead the attacks, and the accuracy left is not robustness"


def main() -> None:
    """Entry point: a user's mistake is one line and status 2, Ctrl-C status 130, a bug a traceback."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"casemate {version('casemate')}")
        raise typer.Exit()


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of every command."""


# --- list ---------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="attacks, defenses, detectors, networks or datasets")] = None,
) -> None:
    """What exists: every registered attack, defense, detector, network and dataset, in a line each."""
    from rich.console import Console
    from rich.table import Table

    with one_line_errors("interrupted"):
        if kind is not None and kind not in KINDS:
            raise UserError(f"no kind {kind!r}{near(kind, KINDS)}")
        for title in [kind] if kind else list(KINDS):
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            table.add_column("name", style="cyan", no_wrap=True)
            table.add_column("what it is")
            for name in registry.names(KINDS[title]):
                table.add_row(name, describe(KINDS[title], name))
            Console().print(table, "")


def describe(kind: str, name: str) -> str:
    """The first sentence of its module's docstring, or of its class's where a module holds several; no import."""
    module, attribute = registry.location(kind, name)
    tree = ast.parse(registry.source_file(kind, name).read_text())
    several = sum(target.partition(":")[0] == module for target in registry.TABLES[kind].values()) > 1
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == attribute), None)
    text = ast.get_docstring(found if several and found is not None else tree) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<! al\.)(?<=\.) ", paragraph)[0]


# --- evaluate -----------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="file.py:callable or package.module:callable; a checkpoint (.safetensors, .pt) with --network; "
            "the folder of a trained row or a released model; or an .onnx file. "
            "Images go in as N x C x H x W in [0, 1]."
        ),
    ],
    data: Annotated[str, typer.Option(help="A dataset of `casemate list datasets`, or a folder with one per class.")],
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    radius: Annotated[str, typer.Option(help="In pixel units of [0, 1], such as 8/255.")] = "8/255",
    attacks: Annotated[
        str, typer.Option(help="Comma-separated; options after colons: pgd:steps=100:restarts=5,cw_margin.")
    ] = "pgd:steps=100,cw_margin:steps=100",
    images: Annotated[int, typer.Option(min=1, help="How many test images, from a fixed random order.")] = 1000,
    network: Annotated[str | None, typer.Option(help="The network of a checkpoint.")] = None,
    network_option: Annotated[list[str] | None, typer.Option(help="key=value, such as depth=28.")] = None,
    normalise: Annotated[bool, typer.Option(help="The checkpoint's network normalises by the dataset.")] = False,
    shape: Annotated[str | None, typer.Option(help="C,H,W of the model's images, where the data do not say.")] = None,
    source: Annotated[Path | None, typer.Option(help="Folder of a trained row that transfer is crafted on.")] = None,
    gate: Annotated[bool, typer.Option(help="Run the masking gate.")] = True,
    chunk: Annotated[int, typer.Option(min=1, help="Images attacked at once; less needs less memory.")] = 500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    ledger: Annotated[Path, typer.Option(help="Where results are kept, chunk by chunk.")] = Path(".casemate/ledger"),
    data_root: Annotated[Path, typer.Option(help="Where datasets are kept.")] = Path("data/raw"),
) -> None:
    """How much of a model's accuracy is left under attack. Prints what it will cost before it starts."""
    logging.basicConfig(format="%(message)s")
    resume = f"interrupted; finished chunks are kept in {ledger}: run the same command again to go on"
    with one_line_errors(resume):
        if out is not None:
            check_file("--out", out)
        check_folder("--ledger", ledger)
        threat = _threat(norm, radius)

        from casemate.evaluation.bring import Request
        from casemate.evaluation.ledger import Ledger

        params = _params(attacks, images, chunk, gate, source)
        where = _device(device)
        request = Request(
            model, data, data_root, where, network, _pairs(network_option or [], "--network-option"), normalise,
            _shape(shape),
        )  # fmt: skip
        report = _attack(request, threat, params, Ledger(ledger, chunk), source, seed)
        _show(report)
        if out is not None:
            temporary = out.with_name(f".{out.name}.tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            temporary.replace(out)


@app.command()
def distances(
    images: Annotated[Path, typer.Argument(help="adversarial.npz of an evaluated row.")],
    protocol: Annotated[str, typer.Option(help="digits, mnist, cifar or imagenet: which windows are compared.")],
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many images.")] = None,
    projections: Annotated[int, typer.Option(min=0, help="Add the sliced distance, of so many directions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write every image's distances here, as JSON.")] = None,
) -> None:
    """The internal Wasserstein distance of adversarial images from their clean ones, beside linf and l2."""
    with one_line_errors("interrupted; nothing was written"):
        from casemate.evaluation.distances import stored_distances
        from casemate.iwd import PROTOCOLS

        if out is not None:
            check_file("--out", out)
        if protocol not in PROTOCOLS:
            raise UserError(f"--protocol {protocol}: no such protocol{near(protocol, PROTOCOLS)}")
        found = stored_distances(images, PROTOCOLS[protocol], images=limit, projections=projections)
        for attack, figures in found.summary().items():
            typer.echo(f"{attack}: {figures.pop('n')} successful; median (quartiles)")
            for name, f in figures.items():
                typer.echo(f"  {name}: {f['median']:.4g} ({f['q25']:.4g} to {f['q75']:.4g})")
        if out is not None:
            found.save(out)


def _threat(norm: str, radius: str) -> ThreatModel:
    if norm not in ("linf", "l2"):
        raise UserError(f"--norm {norm}: known are linf and l2")
    try:
        value = float(fraction(radius))
        check_radius(norm, value)
    except ValueError as error:
        raise UserError(f"--radius: {error}") from None
    if value <= 0:
        raise UserError(f"--radius {radius}: must be above 0, in pixel units of [0, 1], such as 8/255")
    from casemate.threat import ThreatModel

    return ThreatModel("linf" if norm == "linf" else "l2", value)


def _params(attacks: str, images: int, chunk: int, gate: bool, source: Path | None) -> EvaluateParams:
    """The suite that the options describe. Raises UserError for an unknown attack or option."""
    from pydantic import ValidationError

    from casemate.evaluation.schema import EvaluateParams

    cells: dict[str, Any] = {}
    for text in attacks.split(","):
        name, *pairs = text.strip().split(":")
        registry.location("attack", name)
        known = registry.schema("attack", name)
        chosen = _pairs(pairs, f"attack {name}")
        for key in chosen:
            if key not in known.model_fields:
                raise UserError(f"attack {name} has no option {key!r}{near(key, known.model_fields)}")
        try:
            known(**chosen)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"attack {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        again = sum(cell["attack"] == name for cell in cells.values())
        cells[f"{name}-{again + 1}" if again else name] = {"attack": name, "options": chosen}
    crafted = [c["attack"] for c in cells.values() if registry.declared("attack", c["attack"], "binds") == "source"]
    if source is None and crafted:
        raise UserError(f"attack {crafted[0]} needs --source, the folder of a trained row to craft examples on")
    return EvaluateParams.model_validate(
        {
            "source": source.name if source is not None else None, "chunk": chunk, "subset": 0,
            "gate": {"images": images} if gate else None,
            "suites": {"attacks": {"images": images, "attacks": cells}},
        }
    )  # fmt: skip


def _pairs(pairs: list[str], what: str) -> dict[str, Any]:
    """`key=value` texts as a dict; numbers and true/false are read as such."""
    chosen: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{what}: {pair!r} is not key=value")
        try:
            chosen[key] = json.loads(value)
        except ValueError:
            chosen[key] = value
    return chosen


def _device(device: str) -> str:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: known are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape {text}: give channels, height and width, such as 3,32,32")
    channels, height, width = map(int, parts)
    return channels, height, width


def _attack(
    request: Request, threat: ThreatModel, params: EvaluateParams, ledger: Ledger, source: Path | None, seed: int
) -> dict[str, Any]:
    """Load, say what it will cost, run what the ledger lacks. The report of `evaluate_row`, and what to beware of."""
    from casemate.evaluation.bring import load_source
    from casemate.evaluation.images import EvaluationSet
    from casemate.evaluation.suite import About, Candidate, evaluate_row

    bound = load_source(source, request.device) if source is not None else None
    brought = request.load()
    brought.check_attacks(cell.attack for suite in params.suites.values() for cell in suite.attacks.values())
    for note in brought.notes:
        print(note)
    name = Path(request.model).name
    about = About("own", name, "unknown", request.data, brought.network, brought.classes, brought.card)
    with _progress() as progress:
        done = evaluate_row(
            about, [Candidate(brought.system)], EvaluationSet(brought.images, request.device), threat, params,
            ledger, seed=seed, source=bound, progress=progress,
        )  # fmt: skip
    entry = done.report["systems"][0]
    cautions = list(brought.notes)
    if not entry["cells"]:
        cautions.append(NOT_ATTACKED)
    elif "gradient" not in brought.system.offers:
        cautions.append(BLACK_BOX)
    if entry["gate"]["verdict"] == "unreliable":
        cautions.append(MASKED)
    return {**done.report, "cautions": cautions}


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _show(report: dict[str, Any]) -> None:
    """The report as a table."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    entry, console = report["systems"][0], Console()
    title = f"{report['row']} on {report['dataset']}, {report['threat']['text']}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("attack")
    for column in ("left", "95 % interval", "n", "ASR", "passes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_row("none (clean)", *_figures(entry["clean"]))
    for cell in entry["cells"]:
        face = " (static)" if cell["view"] == "static" else ""
        asr = "" if cell["asr"] is None else f"{100 * cell['asr']:.1f} %"
        passes = f"{cell['forwards'] + cell['backwards'] + cell['queries']:.0f}"
        other = cell["threat"]["text"] != report["threat"]["text"]
        name = cell["attack"] + face + (f", {cell['threat']['text']}" if other else "")
        table.add_row(name, *_figures(cell), asr, passes, cell["verdict"])
    worst = entry["worst"]["all"]["adaptive"]
    table.add_section()
    table.add_row("worst case", *(("unknown",) if worst is None else _figures(worst)), style="bold")
    console.print(table)
    for check in entry["gate"]["checks"]:
        mark = "[green]passed[/]" if check["passed"] else "[bold red]FAILED[/]"
        console.print(f"{mark} {check['name']}: {check['detail']}", highlight=False)
    console.print(f"masking gate: {entry['gate']['verdict']}", highlight=False)
    for caution in report["cautions"]:
        console.print(f"note: {caution}", style="yellow", highlight=False)


def _figures(rate: dict[str, Any]) -> tuple[str, str, str]:
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{100 * rate['accuracy']:.2f} %", f"{low:.1f} to {high:.1f}", f"{rate['n']:,}"
