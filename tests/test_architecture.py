"""The house plan, as assertions: imports run downward, torch stays out of light modules, versions are looked at."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import registry, versions

SRC = Path(registry.__file__).parent
FLOORS = {
    "errors": 0, "fields": 0, "seeding": 0, "registry": 1, "versions": 2,
    "data": 2, "networks": 2, "threat": 2, "iwd": 2, "objectives": 3, "system": 3, "trainable": 3,
    "ensemble": 4, "randomised": 4, "attacks": 4, "purification": 5, "detectors": 6, "defenses": 6,
    "training": 7, "evaluation": 8, "deploy": 8, "reporting": 8,
    "params": 9, "tracking": 10, "model_registry": 11, "loading": 12, "serving": 13, "cli_serving": 14, "cli": 15,
    "__init__": 16,
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
        assert parts[0] != "mlflow" or here in ("tracking", "model_registry"), f"{path} imports mlflow"
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


@pytest.mark.parametrize("name", registry.names("defense"))
def test_what_a_defense_inherits_is_an_input_of_its_training(name: str) -> None:
    """Its own file is one; the files of its bases must be in the training room (`versions.ROOMS`)."""
    files = {registry.source_file("defense", name), *versions.members("training")}
    bases = {base.__module__ for base in registry.resolve("defense", name).__mro__}
    assert {
        SRC.joinpath(*base.split(".")[1:]).with_suffix(".py") for base in bases if base[:9] == "casemate."
    } <= files


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
