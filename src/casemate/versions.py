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
        "seeding",
        "attacks/ascent",
        "attacks/learned",
        "attacks/distributions",
        "defenses",
    ),
    "evaluation": (
        "evaluation",
        "attacks/base",
        "attacks/ascent",
        "system",
        "randomised",
        "detectors",
        "threat",
        "objectives",
        "purification",
    ),
    "deploy": ("deploy",),
    "reporting": ("reporting", "templates"),
}
"""Folders and modules of each room. Registered defenses and attacks are left out where their own file is the input,
in `defenses/` and `attacks/`."""


def versions() -> dict[str, int]:
    """The number of each room."""
    return {room: int(entry["version"]) for room, entry in yaml.safe_load(FILE.read_text()).items()}


def fingerprint(room: str) -> str:
    """A hash over the code of a room."""
    own = {target.partition(":")[0] for kind in ("defense", "attack") for target in TABLES[kind].values()}
    own = {module for module in own if module.startswith(("casemate.attacks.", "casemate.defenses."))}
    digest = hashlib.sha256()
    for name in ROOMS[room]:
        path = SOURCE / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            if file.suffix in (".j2", ".css"):
                digest.update(file.read_bytes())
            if file.suffix != ".py":
                continue
            module = ".".join(("casemate", *file.relative_to(SOURCE).with_suffix("").parts))
            if module.endswith(".__init__") or module in own or not file.exists():
                continue
            digest.update(f"{module} {code_hash(module)}\n".encode())
    return digest.hexdigest()[:16]


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
