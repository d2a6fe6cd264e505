"""Attacks of other libraries behind one face: `peer(model, threat, seed)` gives a run, `run(x, y)` the images.

A library is imported when its peer is called, never before. What draws noise is seeded by `seed`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from casemate.networks.quick import usual
from casemate.threat import ThreatModel

Run = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[nn.Module, ThreatModel, int], Run]

PACKAGES = {
    "pyautoattack": "pyautoattack",
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "ART": "adversarial-robustness-toolbox",
}
MODULES = {"ART": "art"}
"""Where the name of the module is not the library's."""
ABOUT = {"pyautoattack": "the code of AutoAttack's authors as a package"}


def plain(model: nn.Module) -> nn.Module:
    """A copy as a user of another library would have it: torch's own layers, contiguous."""
    copied = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    usual(copied)
    return copied


def _upper(threat: ThreatModel) -> str:
    return {"linf": "Linf", "l2": "L2"}[threat.norm]


# --- pyautoattack ---------------------------------------------------------------------------------------------------


def authors(attack: str, **settings: Any) -> Peer:
    """One attack of AutoAttack by its authors: apgd-ce, apgd-dlr, apgd-t, fab-t or square, of one restart."""

    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        common = {"norm": _upper(threat), "eps": threat.radius, "seed": seed, "n_restarts": 1, "device": "cpu"}
        made: Any
        if attack in ("apgd-ce", "apgd-dlr"):
            made = APGDAttack(model, loss=attack.removeprefix("apgd-"), **common, **settings)
        elif attack == "apgd-t":
            made = APGDAttack_targeted(model, **common, **settings)
        elif attack == "fab-t":
            made = FABAttack_PT(model, targeted=True, **common, **settings)
        else:
            made = SquareAttack(model, resc_schedule=False, **common, **settings)

        def run(x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = made.perturb(x, y)
            return found

        return run

    return peer


def authors_standard(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
    """The ensemble, version "standard", by its authors."""
    from pyautoattack import AutoAttack

    made = AutoAttack(model, norm=_upper(threat), eps=threat.radius, seed=seed, version="standard")
    return lambda x, y: made.run_standard_evaluation(x, y, batch_size=500)[0]


# --- torchattacks ---------------------------------------------------------------------------------------------------


def torchattacks(*attacks: tuple[str, dict[str, Any]]) -> Peer:
    """Attacks that take `norm`, `eps` and `seed`; several are run on what the ones before have left."""

    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        import torchattacks as library

        common = {"norm": _upper(threat), "eps": threat.radius, "seed": seed}
        made = [getattr(library, name)(model, **common, **options) for name, options in attacks]
        run: Run = made[0] if len(made) == 1 else library.MultiAttack(made)
        return run

    return peer


def torchattacks_fgsm(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
    import torchattacks as library

    run: Run = library.FGSM(model, eps=threat.radius)
    return run


def torchattacks_pgd(steps: int, relative_step: float) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        import torchattacks as library

        kind = {"linf": library.PGD, "l2": library.PGDL2}[threat.norm]
        size = relative_step * threat.radius
        run: Run = kind(model, eps=threat.radius, alpha=size, steps=steps, random_start=False)
        return run

    return peer


# --- foolbox --------------------------------------------------------------------------------------------------------


def _foolbox(model: nn.Module, attack: Any, radius: float | None) -> Run:
    """With a radius the images inside it; without one, of an attack that minimises, the nearest that it found."""
    import foolbox

    victim = foolbox.models.PyTorchModel(model, bounds=(0, 1), device="cpu")

    def run(x: Tensor, y: Tensor) -> Tensor:
        raw, clipped, _ = attack(victim, x, y, epsilons=radius)
        found: Tensor = raw if radius is None else clipped
        return found

    return run


def foolbox_fgsm(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
    import foolbox

    return _foolbox(model, foolbox.attacks.LinfFastGradientAttack(random_start=False), threat.radius)


def foolbox_pgd(steps: int, relative_step: float) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        import foolbox

        kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[threat.norm]
        made = kind(abs_stepsize=relative_step * threat.radius, steps=steps, random_start=False)
        return _foolbox(model, made, threat.radius)

    return peer


def foolbox_cw(steps: int, rounds: int, rate: float, first_weight: float, abort_early: bool) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        import foolbox

        made = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=rounds, steps=steps, stepsize=rate, confidence=0, initial_const=first_weight,
            abort_early=abort_early,
        )  # fmt: skip
        return _foolbox(model, made, None)

    return peer


# --- ART ------------------------------------------------------------------------------------------------------------


def _art(model: nn.Module, attack: Callable[[Any, int], Any]) -> Run:
    """`attack` makes one from ART's classifier and a batch size."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        from art.estimators.classification import PyTorchClassifier

        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        victim = PyTorchClassifier(
            model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes, clip_values=(0, 1),
            device_type="cpu",
        )  # fmt: skip
        labels = np.eye(classes, dtype=np.float32)[y.numpy()]
        return torch.from_numpy(attack(victim, len(x)).generate(x.numpy(), labels))

    return run


def art_fgsm(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
    from art.attacks.evasion import FastGradientMethod

    radius = threat.radius
    return _art(model, lambda victim, n: FastGradientMethod(victim, eps=radius, eps_step=radius, batch_size=n))


def art_pgd(steps: int, relative_step: float) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch

        settings = {
            "norm": {"linf": np.inf, "l2": 2}[threat.norm], "eps": threat.radius,
            "eps_step": relative_step * threat.radius, "max_iter": steps, "num_random_init": 0, "verbose": False,
        }  # fmt: skip
        return _art(model, lambda victim, n: ProjectedGradientDescentPyTorch(victim, batch_size=n, **settings))

    return peer


def art_cw(steps: int, rounds: int, rate: float, first_weight: float) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel, seed: int) -> Run:
        from art.attacks.evasion import CarliniL2Method

        settings = {
            "confidence": 0.0, "learning_rate": rate, "binary_search_steps": rounds, "max_iter": steps,
            "initial_const": first_weight, "verbose": False,
        }  # fmt: skip
        return _art(model, lambda victim, n: CarliniL2Method(victim, batch_size=n, **settings))

    return peer
