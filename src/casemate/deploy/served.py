"""An exported file attacked as it is served: black box through ONNX Runtime, and with images that were made on the
PyTorch system it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.attacks.apgd import APGD
from casemate.attacks.base import Attack
from casemate.attacks.black_box import RayS
from casemate.attacks.square import Square
from casemate.deploy.onnx_system import OnnxSystem
from casemate.system import System
from casemate.threat import ThreatModel, untargeted

CHUNK = 250
"""Images attacked at once."""


@dataclass(frozen=True)
class Search:
    """How hard. queries: of Square and of RayS on each image. steps: of APGD on the PyTorch system."""

    queries: int = 1000
    steps: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Fallen:
    """Which of N images are wrong, by what was tried, in that order; each attack meets those that stood before it.

    `clean` (N,) bool: wrong as they came. `attacks`: name -> (N,) bool. `source`: the same of the PyTorch system, by
    what was crafted on it.
    """

    clean: np.ndarray
    attacks: Mapping[str, np.ndarray]
    source: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def all(self) -> np.ndarray:
        """(N,) bool: fallen to anything."""
        union: np.ndarray = np.any([self.clean, *self.attacks.values()], axis=0)
        return union

    def report(self) -> dict[str, Any]:
        """{"clean", "served": rates with intervals and n, the latter with "attacks"; "left": share of all images that
        still stands after each attack}."""
        from casemate.evaluation.robustness import rate

        left, standing = {}, ~self.clean
        for name, fell in self.attacks.items():
            standing = standing & ~fell
            left[name] = float(standing.mean()) if len(standing) else 0.0
        return {"clean": rate(self.clean), "served": {**rate(self.all), "attacks": list(self.attacks)}, "left": left}


def attack_file(
    file: OnnxSystem, x: Tensor, y: Tensor, threat: ThreatModel, search: Search = Search(), *,
    source: System | None = None, attacks: Mapping[str, Attack] | None = None, stored: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> Fallen:  # fmt: skip
    """What falls of images `x` (N x C x H x W in [0, 1]) with labels `y` (N,) inside `threat`.

    First `stored`, adversarial images like `x` that an evaluation kept (one that lies outside the ball counts for
    nothing); then `attacks` on the adaptive view of `source`, by default APGD, or its own procedures where no view
    meets the whole system; then Square, and in linf RayS, which ask nothing but the file. A file that takes grey
    levels is attacked within the whole levels of a linf ball, so that rounding leads out of none.
    """
    threat = reachable(threat, file)
    clean = (_decided(file, x) != y).cpu().numpy()  # to reject a clean image is an error, too
    standing: np.ndarray = ~clean
    found: dict[str, np.ndarray] = {}
    fooled: dict[str, np.ndarray] = {}

    def tried(name: str, images: Callable[[Tensor, Tensor, int], Tensor], seen: np.ndarray | None = None) -> None:
        nonlocal standing
        fell = np.zeros(len(y), dtype=bool)
        for rows in _chunks(np.flatnonzero(standing)):
            at = torch.from_numpy(rows)
            made = images(x[at], at, search.seed + int(rows[0]))
            inside, goal = threat.contains(made, x[at]).cpu().numpy(), untargeted(y[at])
            fell[rows] = inside & goal.reached(_decided(file, made)).cpu().numpy()
            if source is not None and seen is not None:
                seen[rows] = inside & goal.reached(source.decide(made)).cpu().numpy()
        standing, found[name] = standing & ~fell, fell
        if progress is not None:
            progress(f"{name}: {100 * standing.mean():.1f} % left")

    def by(attack: Attack, system: System, view: str = "adaptive") -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda part, at, seed: attack(system, part, untargeted(y[at]), threat, seed, view=view).x_adv

    if stored is not None:
        tried("stored", lambda part, at, seed: stored[at])
    if source is not None:
        for name, attack in (attacks or crafted(source, search)).items():
            fooled[name] = np.zeros(len(y), dtype=bool)
            tried(f"transfer of {name}", by(attack, source), fooled[name])
    tried("square", by(Square(queries=search.queries), file))
    if threat.norm in RayS.norms:
        tried("rays", by(RayS(queries=search.queries), file))
    return Fallen(clean, found, fooled)


def crafted(source: System, search: Search) -> dict[str, Attack]:
    """What is crafted on the PyTorch system: APGD, or where no view meets all of its inference its procedures."""
    from casemate.evaluation.plan import blind

    if "gradient" not in source.offers:
        return {}
    return source.adaptive_attacks() if blind(source) else {"apgd": APGD(steps=search.steps)}


def reachable(threat: ThreatModel, file: OnnxSystem) -> ThreatModel:
    """The ball whose points the file can be sent: of whole grey levels where it takes uint8 and the norm is linf."""
    if threat.norm != "linf" or not file.model.input.uint8:
        return threat
    return ThreatModel("linf", math.floor(threat.radius * 255 + 1e-6) / 255)


def _decided(file: OnnxSystem, x: Tensor) -> Tensor:
    return torch.cat([file.decide(x[at : at + CHUNK]) for at in range(0, max(len(x), 1), CHUNK)])


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK)]
