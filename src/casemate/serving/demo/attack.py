"""One image attacked at a chosen budget: by gradients where the PyTorch model is there, else by asking the file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from casemate.attacks.base import Attack
    from casemate.system import System

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Attacked:
    """image: 1 x C x H x W in [0, 1], inside the budget. success: the attacked model decided otherwise. tried: names
    of the attacks, the last being the one whose image this is."""

    image: np.ndarray
    success: bool
    tried: tuple[str, ...]
    white_box: bool
    seconds: float


def attack_image(
    victim: System, image: np.ndarray, label: int, norm: Norm, radius: float, *, steps: int = 50, queries: int = 2000
) -> Attacked:
    """Away from `label`, by one attack after another until one succeeds.

    With gradients: APGD on two losses, then every procedure that the defense itself ships against those who know it.
    Without: Square, which needs scores alone.
    """
    import torch

    from casemate.threat import ThreatModel, untargeted

    x, threat, began = torch.from_numpy(image), ThreatModel(norm, radius), time.perf_counter()
    goal = untargeted(torch.tensor([label]))
    tried: list[str] = []
    found, success = image, False
    for name, attack in procedures(victim, norm, steps, queries):
        tried.append(name)
        result = attack(victim, x, goal, threat, seed=len(tried))
        found, success = result.x_adv.numpy(), bool(result.success[0])
        if success:
            break
    return Attacked(found, success, tuple(tried), "gradient" in victim.offers, time.perf_counter() - began)


def procedures(victim: System, norm: Norm, steps: int, queries: int) -> Iterator[tuple[str, Attack]]:
    """(name for people, attack), those that this model and norm allow. A defense's published attacks are weak by
    their own account, and left out."""
    from casemate.attacks.apgd import APGD
    from casemate.attacks.square import Square

    if "gradient" not in victim.offers:
        yield "Square", Square(queries=queries, rescale=True)
        return
    yield "APGD on cross-entropy", APGD(objective="ce", steps=steps)
    yield "APGD on the margin", APGD(objective="margin", steps=steps)
    for name, attack in victim.adaptive_attacks().items():
        if not attack.published and norm in attack.norms and not attack.needs - victim.offers:
            yield name.replace("_", " "), attack
