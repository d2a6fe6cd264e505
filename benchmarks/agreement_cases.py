"""What is compared: one `Case` for each attack and setting. A new attack joins with one entry in `CASES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.agreement_libraries import (
    Peer,
    art_cw,
    art_fgsm,
    art_pgd,
    authors,
    authors_standard,
    foolbox_cw,
    foolbox_fgsm,
    foolbox_pgd,
    torchattacks,
    torchattacks_fgsm,
    torchattacks_pgd,
)
from casemate.attacks.apgd import APGD, APGDT
from casemate.attacks.autoattack import AutoAttack
from casemate.attacks.base import Attack
from casemate.attacks.carlini_wagner import CWL2
from casemate.attacks.fab import FABT
from casemate.attacks.gradient import FGSM, PGD
from casemate.attacks.square import Square
from casemate.threat import Norm

Measure = Literal["left", "decisions", "norm"]
"""Accuracy left over seeds; which images fall; or how far the nearest adversarial images are."""


@dataclass(frozen=True)
class Case:
    """One setting of one attack. `peers`: {library: what runs the same there}."""

    name: str
    measure: Measure
    ours: Attack
    peers: dict[str, Peer]
    setting: str
    norms: tuple[Norm, ...] = ("linf", "l2")
    noise: bool = False
    """Whether it draws noise, and is run for several seeds."""


def _cw(name: str, steps: int, rounds: int, rate: float, first_weight: float, *, early: bool, art: bool) -> Case:
    ours = CWL2(steps=steps, rounds=rounds, rate=rate, first_weight=first_weight, abort_early=early)
    peers = {"foolbox": foolbox_cw(steps, rounds, rate, first_weight, early)}
    if art:
        peers["ART"] = art_cw(steps, rounds, rate, first_weight)
    setting = f"{rounds} rounds, {steps} steps, rate {rate:g}, weight {first_weight:g}" + ", early stop" * early
    return Case(name, "norm", ours, peers, setting, ("l2",))


STEPS, RELATIVE = 40, 2.5 / 40
CE, T = ("APGD", {"steps": 100, "loss": "ce"}), ("APGDT", {"steps": 100})
DLR = ("APGD", {"steps": 100, "loss": "dlr"})
FAB, SQUARE = ("FAB", {"steps": 100, "multi_targeted": True}), ("Square", {"n_queries": 5000, "resc_schedule": False})

CASES = [
    Case("fgsm", "decisions", FGSM(),
         {"torchattacks": torchattacks_fgsm, "foolbox": foolbox_fgsm, "ART": art_fgsm}, "one step", ("linf",)),
    Case("pgd", "decisions", PGD(steps=STEPS, relative_step=RELATIVE, random_start=False, keep="last"),
         {"torchattacks": torchattacks_pgd(STEPS, RELATIVE), "foolbox": foolbox_pgd(STEPS, RELATIVE),
          "ART": art_pgd(STEPS, RELATIVE)}, "40 steps of radius / 16, no random start"),
    _cw("cw_l2", 1000, 9, 0.01, 0.001, early=False, art=False),
    _cw("cw_l2_early", 1000, 9, 0.01, 0.001, early=True, art=False),
    _cw("cw_l2_short", 100, 9, 0.1, 1.0, early=False, art=True),
    Case("apgd_ce", "left", APGD(),
         {"pyautoattack": authors("apgd-ce"), "torchattacks": torchattacks(CE)}, "100 steps",
         noise=True),
    Case("apgd_dlr", "left", APGD(objective="dlr"),
         {"pyautoattack": authors("apgd-dlr"), "torchattacks": torchattacks(DLR)}, "100 steps",
         noise=True),
    Case("apgd_t", "left", APGDT(),
         {"pyautoattack": authors("apgd-t"), "torchattacks": torchattacks(T)}, "9 targets, 100 steps",
         noise=True),
    Case("fab_t", "left", FABT(),
         {"pyautoattack": authors("fab-t"), "torchattacks": torchattacks(FAB)}, "9 targets, 100 steps"),
    Case("square", "left", Square(),
         {"pyautoattack": authors("square"), "torchattacks": torchattacks(SQUARE)}, "5000 queries",
         noise=True),
    Case("autoattack", "left", AutoAttack(),
         {"pyautoattack": authors_standard, "torchattacks": torchattacks(CE, T, FAB, SQUARE)},
         "standard, 100 steps in all libraries", noise=True),
]  # fmt: skip
