"""The house plan, as assertions: imports run downward, torch stays out of light modules, versions are looked at."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from casemate import registry, versions
from casemate.evaluation import keys

SRC = Path(registry.__file__).parent
ROOT = SRC.parents[1]
STAGES: dict[str, Any] = {
    name: stage.get("do", stage) for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
FLOORS = {
    "errors": 0, "fields": 0, "seeding": 0, "registry": 1, "versions": 2,
    "data": 2, "networks": 2, "threat": 2, "iwd": 2, "objectives": 3, "system": 3, "trainable": 3,
    "ensemble": 4, "randomised": 4, "attacks": 4, "purification": 5, "detectors": 6, "defenses": 6,
    "training": 7, "evaluation": 8, "deploy": 8, "reporting": 8,
    "params": 9, "run_store": 9, "tracking": 10, "model_registry": 11, "loading": 12, "serving": 13,
    "cli_serving": 14, "cli": 15, "__init__": 16,
}  # fmt: skip
"""A module may import its own floor's package and anything below it."""

BESIDE = {("evaluation", "deploy"), ("deploy", "evaluation"), ("training", "attacks")}
"""Rooms on one floor that may use each other, inside functions only."""


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(path: Path) -> set[tuple[str, bool]]:
    """(dotted name, whether at the top of the module) of everything a module imports."""
    tree = ast.parse(path.read_text())
    top = {id(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)} & {id(n) for n in tree.body}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_downward(path: Path) -> None:
    here = room(path)
    for name, top in imported(path):
        parts = name.split(".")
        assert parts[0] != "pipeline", f"{path} imports the pipeline"
        assert parts[0] != "mlflow" or here in ("run_store", "tracking", "model_registry"), f"{path} imports mlflow"
        if parts[0] != "casemate" or len(parts) < 2 or parts[1] == here or parts[1] not in FLOORS:
            continue
        below = FLOORS[parts[1]] < FLOORS[here]
        assert below or (not top and (here, parts[1]) in BESIDE), f"{path.name} ({here}) imports {name}"


LIGHT = [f"casemate{m}" for m in ("", ".params", ".registry", ".cli", ".data.sources", ".versions")]
LIGHT += [f"pipeline.{m}" for m in ("common", "dag", "detect", "download", "report", "train")]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_mlflow(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'mlflow', 'matplotlib', 'sklearn'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in registry.TABLES for n in registry.names(k)])
def test_every_registered_class_reads_as_it_runs(kind: str, name: str) -> None:
    """The schema read from the source has the fields and defaults of the class itself, which is documented."""
    cls = registry.resolve(kind, name)
    read = registry.schema(kind, name).model_fields
    defaults = {
        f.name: ... if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING else f.default
        for f in dataclasses.fields(cls)
    }
    assert {key: ... if field.is_required() else field.default for key, field in read.items()} == defaults
    assert (cls.__doc__ or "").strip()
    if kind == "defense":
        assert registry.source_file(kind, name).stem == name  # dvc.yaml finds a method's file by its name


@pytest.mark.parametrize("room_name", versions.ROOMS)
def test_shared_code_has_been_looked_at(room_name: str) -> None:
    recorded = versions.yaml.safe_load(versions.FILE.read_text())[room_name]["code"]
    assert recorded == versions.fingerprint(room_name), (
        f"the code of '{room_name}' has changed: 'python -m pipeline versions {room_name}' if results may change, "
        "'python -m pipeline versions' if they cannot"
    )


WITHOUT_SAY = {f"src/casemate/{name}.py" for name in ("errors", "fields", "registry", "attacks/diagnostics")}
"""Words, checks of options and warnings: no weight depends on them."""
OF_INFERENCE = tuple(
    f"src/casemate/{name}"
    for name in (
        "purification/",
        "attacks/adaptive.py",
        "attacks/gradient.py",
        "attacks/joint.py",
        "attacks/manifold.py",
    )
)
"""What a defense adds at test time, and attacks on that: evaluation's inputs, not training's."""


def reached(module: str) -> set[str]:
    """The project's files that a module imports, at whatever depth, from the project's folder on; packages' own files
    hold no code."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = keys.source_path(name) if name.startswith(("casemate.", "pipeline.")) else None
        if name not in found and path is not None:
            found[name] = path
            waiting += keys._imports(path, path.stat().st_mtime_ns)
    return {path.relative_to(ROOT).as_posix() for path in found.values() if path.stem != "__init__"}


METHODS = [(kind, name) for kind in ("defense", "learned_attack") for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_what_a_method_imports_is_an_input_of_its_training(kind: Any, name: str) -> None:
    """Its own file is one; all else must be in a room that its stage depends on (`versions.ROOMS`)."""
    shared = {file for room in ("data", "networks", "training") for file in versions.members(room)}
    inputs = {path.relative_to(ROOT).as_posix() for path in (registry.source_file(kind, name), *shared)}
    found = {path for path in reached(registry.location(kind, name)[0]) if not path.startswith(OF_INFERENCE)}
    assert "src/casemate/system.py" in found and found - inputs <= WITHOUT_SAY


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_runs_is_an_input_of_it(name: str) -> None:
    """The scripts it imports, and the attacks, unless it runs none or a room has those that it runs."""
    deps = set(STAGES[name].get("deps", ()))
    found = reached(STAGES[name]["cmd"].split()[2])
    if name != "detect_index":  # it lists names
        assert {path for path in found if path.startswith("pipeline/")} - {"pipeline/common.py"} <= deps
    if any(path.startswith("src/casemate/attacks/") for path in found):
        assert "src/casemate/attacks" in deps or name in ("pretrain", "train", "tune", "detect_index")


def test_a_registered_method_is_in_a_room_only_where_it_is_named() -> None:
    inside = {str(path.relative_to(SRC)) for path in versions.members("training")}
    assert {"defenses/crafting.py", "attacks/l2l.py", "training/loop.py"} <= inside
    assert not {"defenses/atld.py", "attacks/gap.py", "training/__init__.py"} & inside
    assert SRC / "templates" / "style.css" in versions.members("reporting")


def test_a_comment_is_no_change_and_a_fix_is(tmp_path: Path) -> None:
    source = '"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n'
    commented = '"""Another."""\n# why\ndef f(x):\n\n    return x + 1  # note\n'
    fixed = source.replace("+ 1", "+ 2")
    assert registry.text_hash(source) == registry.text_hash(commented)
    assert registry.text_hash(source) != registry.text_hash(fixed)
