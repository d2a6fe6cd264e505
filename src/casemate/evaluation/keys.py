"""What identifies a row of the ledger: the system, the attack and the code of both, hashed. Imports no torch.

Comments, docstrings and layout do not count as code, so a comment never reruns an attack, and a fix always does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casemate.registry import text_hash
from casemate.seeding import derive

if TYPE_CHECKING:
    from casemate.attacks.base import Attack
    from casemate.system import System
    from casemate.threat import ThreatModel

ENGINE = (
    "casemate.attacks", "casemate.objectives", "casemate.threat", "casemate.seeding", "casemate.iwd",
    "casemate.networks",
)  # fmt: skip
INFERENCE = (
    "casemate.system", "casemate.randomised", "casemate.networks", "casemate.purification", "casemate.detectors",
)  # fmt: skip
"""Packages whose code decides a result when it is imported, at whatever depth, by the attack or by the system."""


def digest(content: Any) -> str:
    """32 hexadecimal digits for anything JSON can write."""
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a parameter of type {type(value).__name__} cannot identify a result; use numbers and text")


def attack_identity(attack: Attack) -> dict[str, Any]:
    """Class and parameters of an attack: what it does, whatever its code looks like."""
    kind = type(attack)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "parameters": attack.parameters()}


def attack_code(attack: Attack) -> str:
    """A hash of the attack's module and of the engine modules below it, and of what it is bound to: a system, or
    trained networks."""
    held = list(vars(attack).values())
    bound = sorted(system_code(value) for value in held if hasattr(value, "views"))
    networks = [part for value in held if hasattr(value, "named_modules") for part in value.modules()]
    modules = {type(part).__module__ for part in (attack, *held, *networks)}
    return digest([_code(sorted(modules), ENGINE), bound])


def system_code(system: System) -> str:
    """A hash of the code of the system, its networks and its purification."""
    return _code(sorted({type(part).__module__ for part in (system, *_parts(system))}), INFERENCE)


def _parts(system: System) -> Iterable[object]:
    """What a system holds, its members if it is an ensemble, and every module below them."""
    values = [part for v in vars(system).values() for part in (v if isinstance(v, tuple) else (v,))]
    for value in values:
        yield value
        if hasattr(value, "views") and hasattr(value, "decide"):
            yield from _parts(value)
        held = getattr(value, "modules", ())
        owned = [value] if callable(held) else list(held)  # a network's method, or a purification's own modules
        for module in owned:
            yield from module.modules()


def cell_key(system: System, attack: Attack, threat: ThreatModel, view: str, seed: int) -> dict[str, Any]:
    """What decides the rows of a cell, the images excepted."""
    return {
        "ledger": 1,
        "system": system.hash(),
        "system_code": system_code(system),
        "view": view,
        "threat": [threat.norm, repr(float(threat.radius))],
        "attack": {**attack_identity(attack), "code": attack_code(attack)},
        "seed": seed,
    }


def chunk_seed(attack: Attack, images: str, seed: int) -> int:
    """The seed of an attack on a chunk of images: nothing else has a say, so every system meets the same noise on the
    same chunk. Cells of other sizes share all chunks but their last."""
    return derive("attack", digest(attack_identity(attack)), images, seed) % 2**31


def _code(modules: Iterable[str], packages: tuple[str, ...]) -> str:
    reached: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = None if module in reached else source_path(module)
        if path is None:
            continue
        reached[module] = _hash(path, path.stat().st_mtime_ns)
        waiting += [name for name in _imports(path, path.stat().st_mtime_ns) if name.startswith(packages)]
    return digest(reached)


def source_path(module: str) -> Path | None:
    """The file of a module of this project or of the user's; None for libraries, and where there is no file."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return None
    loaded = sys.modules.get(module)
    try:
        found = inspect.getsourcefile(loaded) if loaded is not None else getattr(find_spec(module), "origin", None)
    except (TypeError, ModuleNotFoundError, ValueError):
        return None
    path = Path(found or "")
    library = package != "casemate" and {"site-packages", "dist-packages"} & set(path.parts)
    return path if path.suffix == ".py" and path.exists() and not library else None


@functools.cache
def _hash(path: Path, modified: int) -> str:
    return text_hash(path.read_text())


@functools.cache
def _imports(path: Path, modified: int) -> tuple[str, ...]:
    """Every module that a file imports when it runs, at the top or inside a function."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return tuple(sorted(found))
