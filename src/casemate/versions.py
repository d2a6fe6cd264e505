"""Shared code as an input of the pipeline.

A stage depends on its own script and its method's own file. What they share is in rooms, and `versions.yaml` gives
each room a number that the stages depend on. It also records a fingerprint of the room's code (comments and
docstrings do not count): a test fails when the code has changed and the number has not been looked at.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from casemate.registry import SOURCE, TABLES, code_hash

FILE = SOURCE / "versions.yaml"

ROOMS: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "networks": ("networks",),
    "training": (
        "training",
        "trainable",
        "threat",
        "iwd",
        "seeding",
        "objectives",
        "system",
        "randomised",
        "attacks/base",
        "attacks/ascent",
        "attacks/carlini_wagner",
        "attacks/checks",
        "attacks/chunk",
        "attacks/engine",
        "attacks/minimise",
        "attacks/optimizers",
        "attacks/warping",
        "attacks/learned",
        "attacks/distributions",
        "attacks/explicit",
        "attacks/amortised",
        "attacks/l2l",
        "attacks/internal",
        "attacks/pyramid",
        "defenses",
        "defenses/l2l_da",
        "defenses/trades",
        "defenses/iwdd",
    ),
    "evaluation": (
        "evaluation",
        "attacks/base",
        "attacks/ascent",
        "system",
        "randomised",
        "detectors",
        "threat",
        "iwd",
        "objectives",
        "purification",
    ),
    "deploy": ("deploy",),
    "reporting": ("reporting", "templates"),
}
"""Folders and modules of each room. Registered defenses and attacks, whose own file is the input, are left out of
folders; they are named where others build on them."""


def versions() -> dict[str, int]:
    """The number of each room."""
    return {room: int(entry["version"]) for room, entry in yaml.safe_load(FILE.read_text()).items()}


def members(room: str) -> list[Path]:
    """The files of a room, in order."""
    own = {target.partition(":")[0] for kind in ("defense", "attack") for target in TABLES[kind].values()}
    own = {module for module in own if module.startswith(("casemate.attacks.", "casemate.defenses."))}
    found: list[Path] = []
    for name in ROOMS[room]:
        path = SOURCE / name
        if not path.is_dir():
            found += [file for file in [path.with_suffix(".py")] if file.exists()]
            continue
        for file in sorted(path.rglob("*")):
            code = file.suffix == ".py" and file.stem != "__init__" and _module(file) not in own
            if code or file.suffix in (".j2", ".css"):
                found.append(file)
    return found


def fingerprint(room: str) -> str:
    """A hash over the code of a room."""
    digest = hashlib.sha256()
    for file in members(room):
        if file.suffix == ".py":
            digest.update(f"{_module(file)} {code_hash(_module(file))}\n".encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _module(file: Path) -> str:
    return ".".join(("casemate", *file.relative_to(SOURCE).with_suffix("").parts))


def record(bump: tuple[str, ...] = ()) -> list[str]:
    """Write the fingerprints as they are now, with the numbers of the `bump` rooms raised. Returns changed rooms."""
    old = yaml.safe_load(FILE.read_text()) if FILE.exists() else {}
    new, changed = {}, []
    for room in ROOMS:
        before = old.get(room, {"version": 1, "code": ""})
        code = fingerprint(room)
        if before["code"] != code:
            changed.append(room)
        new[room] = {"version": int(before["version"]) + (room in bump), "code": code}
    text = "# Made by 'python -m pipeline versions': see casemate/versions.py.\n" + yaml.safe_dump(
        new, sort_keys=False
    )
    _replace(FILE, text)
    return changed


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
