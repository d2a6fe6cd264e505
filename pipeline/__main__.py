"""The commands of the pipeline. `run` and `test` need nothing but CPython 3.11 or later, pip and git.

python -m pipeline run [PROFILE]     set up if needed, then the main job: data, training, attacks, ONNX, report
                                     (--cores N: stages side by side, by Snakemake)
python -m pipeline test [TIER]       set up if needed, then the tests: unit, gate (what CI runs) or full
python -m pipeline profile NAME      write params.yaml from pipeline/profiles/NAME.yaml
python -m pipeline check             validate params.yaml
python -m pipeline demo              set up if needed, then the page on which models are attacked by hand
python -m pipeline ui                the MLflow page of the runs, on this machine only
python -m pipeline runs rebuild      make the runs again from the committed reports, after a clone
python -m pipeline runs find FILE    the runs that made an output of the pipeline
python -m pipeline faithfulness      write docs/faithfulness.md: published figures beside those of the reports
python -m pipeline versions [ROOM]   record the fingerprints of the shared code; raise the number of ROOMs
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TIERS = ("unit", "gate", "full")


# --- set-up: nothing but the standard library may be imported up to here ------------------------------------


EXTRAS = ("pipeline", "pipeline,demo", "pipeline,dev")
"""What `.venv` may hold, each more than the one before."""


def set_up(extras: str) -> None:
    """Make `.venv` with the pinned versions, unless it already fits the project's files."""
    if sys.version_info < (3, 11):  # noqa: UP036  an older interpreter is what this is for
        sys.exit(f"error: CPython 3.11 or later is needed, this is {sys.version.split()[0]}")
    pins = (ROOT / "constraints.txt").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    wanted = {hashlib.sha256(pins + e.encode()).hexdigest() for e in EXTRAS[EXTRAS.index(extras) :]}
    stamp = VENV / "casemate-setup"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() in wanted:
        return
    if not PYTHON.exists():
        print("setting up .venv (several GB, a few minutes) ...", flush=True)
        call([sys.executable, "-m", "venv", str(VENV)])
    pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    call([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extras}]"])
    stamp.write_text(hashlib.sha256(pins + extras.encode()).hexdigest())


def call(command: list[str], **environment: str) -> None:
    """Run a command from the project's root inside the environment; end with its status if it fails."""
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", "")])
    defaults = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    try:
        status = subprocess.call(command, cwd=ROOT, env={**os.environ, **defaults, "PATH": path, **environment})
    except KeyboardInterrupt:
        status = 130
    if status:
        sys.exit(status)


def in_environment(*arguments: str) -> None:
    """Run one of these commands again with the environment's Python."""
    call([str(PYTHON), "-m", "pipeline", *arguments])


# --- the commands -------------------------------------------------------------------------------------------


def run(profile: str | None, seed: int | None, force: bool, cores: int | None) -> None:
    """Set up, choose a profile if one is named, `dvc repro`, stages side by side if `cores` are named, and say where
    the results are."""
    if seed is not None and not profile:
        sys.exit("error: --seed needs the profile's name; for the present params.yaml change its seed")
    if not (ROOT / ".git").exists() and shutil.which("git") is None:
        sys.exit("error: git is not installed, and DVC needs a repository here; install git and run again")
    set_up("pipeline")
    if profile:
        seeded = [] if seed is None else ["--seed", str(seed)]
        in_environment("profile", profile, *seeded, *(["--force"] if force else []))
    in_environment("check")
    if not (ROOT / ".git").exists():
        call(["git", "init", "-q"])
    engine = ["dvc", "repro"] if cores is None else ["snakemake", "--cores", str(cores)]
    call([str(PYTHON), "-m", *engine])
    in_environment("summary")


def test(tier: str) -> None:
    """Set up, then lint, types and the tests of a tier; each tier holds the ones before it."""
    set_up("pipeline,dev")
    call([str(PYTHON), "-m", "ruff", "check", "."])
    call([str(PYTHON), "-m", "ruff", "format", "--check", "."])
    call([str(PYTHON), "-m", "mypy"])
    marks = {"unit": "not slow and not full", "gate": "not full", "full": ""}[tier]
    call([str(PYTHON), "-m", "pytest", "-m", marks, "-n", "2", "--dist", "loadfile"], OMP_NUM_THREADS="1")


def demo(port: int) -> None:
    """Set up, then `casemate demo` for the profile of params.yaml."""
    set_up("pipeline,demo")
    command = "from casemate.cli import main; main()"
    call([str(PYTHON), "-c", command, "demo", "--port", str(port)])


def write_profile(name: str, seed: int | None, force: bool) -> None:
    from pipeline.profile import write

    write(name, ROOT / "params.yaml", seed=seed, force=force)


def check() -> None:
    from casemate.params import load_params

    params = load_params(Path("params.yaml"))
    rows = ", ".join(params.rows)
    print(f"params.yaml: profile {params.profile}, {params.dataset}, rows {rows}, budget {params.budget:g}")


def summary() -> None:
    from pipeline.report import print_summary

    print_summary()


def ui(port: int) -> None:
    from casemate import tracking
    from casemate.serving.server import listen
    from pipeline.common import STATE

    store = STATE / "mlflow"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.local_uri(store)
    if uri.startswith(("http://", "https://")):
        print(f"the runs are on the server of MLFLOW_TRACKING_URI: {uri}")
        return
    listen("127.0.0.1", port).close()  # MLflow itself ends as if all were well where the port is taken
    store.mkdir(parents=True, exist_ok=True)
    artifacts = (store.resolve() / "artifacts").as_uri()
    print(f"open 127.0.0.1:{port} in a browser; Ctrl-C ends it", flush=True)
    call([str(PYTHON if PYTHON.exists() else sys.executable), "-m", "mlflow", "ui", "--host", "127.0.0.1",
          "--port", str(port), "--backend-store-uri", uri, "--default-artifact-root", artifacts],
         MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # fmt: skip


def runs(action: str, path: Path | None) -> None:
    from casemate import tracking
    from casemate.errors import UserError
    from casemate.params import load_params
    from pipeline.common import STATE

    experiment = load_params(Path("params.yaml")).tracking.experiment
    if action == "rebuild":
        made = tracking.rebuild(STATE / "mlflow", experiment, Path("reports"))
        print(f"{made} runs made from the committed reports; 'python -m pipeline ui' shows them")
        return
    if path is None or not path.is_file():
        raise UserError("'runs find' needs a file that the pipeline made, such as a weights.safetensors")
    for found in tracking.find_runs(STATE / "mlflow", experiment, path):
        print(found.info.run_id, found.info.run_name, found.data.tags.get("git.commit", ""))


def record_versions(rooms: list[str]) -> None:
    from casemate.errors import UserError, near
    from casemate.versions import ROOMS, record

    for room in rooms:
        if room not in ROOMS:
            raise UserError(f"no room {room!r}{near(room, ROOMS)}")
    changed = record(tuple(rooms))
    print(f"recorded; changed code: {', '.join(changed) or 'none'}; raised: {', '.join(rooms) or 'none'}")


def faithfulness() -> None:
    """Write docs/faithfulness.md anew: what was published of each method beside the committed reports."""
    from casemate.reporting.faithfulness import page

    path = ROOT / "docs" / "faithfulness.md"
    path.write_text(page(ROOT / "reports"))
    print(path.relative_to(ROOT))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("run", "profile"):
        command = commands.add_parser(name)
        command.add_argument("profile", nargs="?" if name == "run" else None)
        command.add_argument("--seed", type=int, help="a training seed of its own: the profile is called NAME_sSEED")
        command.add_argument("--force", action="store_true", help="replace a params.yaml that was edited by hand")
    commands.choices["run"].add_argument(
        "--cores", type=int, help="run stages side by side on so many cores; each has the `threads` of params.yaml"
    )
    commands.add_parser("test").add_argument("tier", nargs="?", default="unit", choices=TIERS)
    commands.add_parser("check")
    commands.add_parser("summary")
    commands.add_parser("demo").add_argument("--port", type=int, default=8080)
    commands.add_parser("ui").add_argument("--port", type=int, default=5000)
    command = commands.add_parser("runs")
    command.add_argument("action", choices=("rebuild", "find"))
    command.add_argument("path", nargs="?", type=Path)
    commands.add_parser("faithfulness")
    commands.add_parser("versions").add_argument("rooms", nargs="*")
    options = parser.parse_args()
    lowest = 0 if options.command == "demo" else 1  # `casemate demo` takes a free port for 0
    if not lowest <= getattr(options, "port", lowest) <= 65535:
        parser.exit(2, f"error: --port {options.port}: must be in {lowest}..65535\n")
    if options.command == "run" and options.cores is not None and options.cores < 1:
        parser.exit(2, f"error: --cores {options.cores}: must be 1 or more\n")
    return options


def main() -> None:
    options = parse()
    if options.command == "run":
        run(options.profile, options.seed, options.force, options.cores)
    elif options.command == "test":
        test(options.tier)
    elif options.command == "demo":
        demo(options.port)
    else:
        os.chdir(ROOT)
        if not PYTHON.exists() and shutil.which("dvc") is None:
            sys.exit("error: not set up yet; 'python3 -m pipeline run' does it")
        from pipeline.common import one_line_errors

        with one_line_errors():
            dispatch(options)


def dispatch(options: argparse.Namespace) -> None:
    if options.command == "profile":
        write_profile(options.profile, options.seed, options.force)
    elif options.command == "check":
        check()
    elif options.command == "summary":
        summary()
    elif options.command == "ui":
        ui(options.port)
    elif options.command == "runs":
        runs(options.action, options.path)
    elif options.command == "faithfulness":
        faithfulness()
    else:
        record_versions(options.rooms)


if __name__ == "__main__":
    main()
