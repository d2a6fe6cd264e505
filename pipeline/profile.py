"""Profiles: complete settings in `pipeline/profiles/*.yaml`, written out as params.yaml by one command.

A profile may begin with `extends: OTHER`: it then holds the differences only. In a mapping that is to replace the
other's as a whole rather than be merged into it, the key `replace: true` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from casemate.errors import UserError, near
from casemate.params import check_params, read_yaml

PROFILES = Path(__file__).parent / "profiles"
HEADER = """\
# Written by 'python -m pipeline profile {name}' from pipeline/profiles/{name}.yaml. Edit freely: every key is checked
# before anything runs. Writing another profile asks before it replaces edits.
"""


def resolved(name: str) -> dict[str, Any]:
    """The profile with everything it extends. Raises UserError for an unknown name or a circle."""
    return _resolve(name, ())


def _resolve(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown profile {name!r}{near(name, known)}")
    if name in seen:
        raise UserError(f"profiles extend each other in a circle: {' -> '.join([*seen, name])}")
    own: dict[str, Any] = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    parent = own.pop("extends", None)
    return own if parent is None else merged(_resolve(parent, (*seen, name)), own)


def merged(base: Any, change: Any) -> Any:
    """`change` laid over `base`, mapping by mapping."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    if change.get("replace") is True:
        return {k: v for k, v in change.items() if k != "replace"}
    return {**base, **{k: merged(base.get(k), v) for k, v in change.items()}}


def text(name: str, seed: int | None = None) -> str:
    """What params.yaml says for a profile, validated; with a seed of its own it is called NAME_sSEED, so that its
    models and reports lie beside those of other seeds."""
    content = resolved(name)
    if seed is not None and seed != content["seed"]:
        content = {**content, "profile": f"{name}_s{seed}", "seed": seed}
    check_params(content, f"profile {name}")
    body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=118)
    return HEADER.format(name=name) + body


def write(name: str, path: Path, *, seed: int | None = None, force: bool = False) -> None:
    """Write the profile to `path`; a file edited by hand is replaced only with `force`."""
    new = text(name, seed)
    if path.exists() and not force and not _replaceable(path, new):
        raise UserError(f"{path.name} was edited by hand; keep a copy, then repeat with --force to replace it")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(new)
    temporary.replace(path)
    print(f"{path.name} now holds the profile {name}" + ("" if seed is None else f" with seed {seed}"))


def _replaceable(path: Path, new: str) -> bool:
    """Whether a file is just what a profile says, with whatever seed; one that cannot be read was edited."""
    try:
        was = read_yaml(path)
        old, seed = path.read_text(encoding="utf-8"), was.get("seed") if isinstance(was, dict) else None
        if old == new or not isinstance(seed, int):
            return old == new
        return any(old in (text(p.stem), text(p.stem, seed)) for p in PROFILES.glob("*.yaml"))
    except UserError:
        return False
