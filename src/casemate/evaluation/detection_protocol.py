"""The detection experiment of the ER paper, repeated and with an attack that knows the detector.

The images of one split are cut into set I, which detectors are fitted to, and set II, which they are judged on. Every
detector meets every attack that it was fitted to (familiar) and every one that it was not (cross). Attacks are on the
classifier alone, as in the paper; `Joint` then shows what is left against an attacker who knows the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casemate import registry
from casemate.attacks.base import Attack
from casemate.attacks.joint import Joint
from casemate.detectors.base import DetectorSystem
from casemate.detectors.fitting import DetectorSpec, FittedDetector, Regression, scores_of
from casemate.errors import UserError
from casemate.evaluation.answers import all_finite
from casemate.evaluation.detection_rows import Seen, rows_of
from casemate.networks.base import Classifier
from casemate.seeding import derive, generator
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted
from casemate.training.artifact import load_artifact, save_artifact

CHUNK = 500
Attacks = Mapping[str, tuple[Attack, ThreatModel]]
Progress = Callable[[str, int, int], None]
"""(what is running, how much of it is done, of how much)."""


@dataclass(frozen=True)
class Protocol:
    """How the experiment is run."""

    share: float = 0.2
    """Of the images, for set I."""
    splits: int = 1
    """Repetitions with other sets I and II, for error bars; the attacks are made once."""
    seed: int = 0
    adaptive: Joint | None = None
    """The attack that knows the detector, run on each detector of the first split in each linf or l2 threat model."""
    adaptive_images: int = 100
    """Of set II, for it."""


def run_protocol(
    classifier: Classifier,
    detectors: Mapping[str, DetectorSpec],
    attacks: Attacks,
    train: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor],
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit and judge `detectors` on one classifier; JSON-able.

    Args:
        classifier: frozen and in eval mode while this runs. In the paper KD and LID stand behind an undefended
            network and the ER-Detector behind an ER-Classifier: call this once for each.
        detectors: by the name they have in the table.
        attacks: by name, with the threat model they stay within. What a minimum-norm attack finds outside of it is
            projected onto it.
        train: training images (N x C x H x W in [0, 1]) and labels: densities and references.
        images: the split that is cut into sets I and II: the test images in the paper, which lets test images be
            fitted to; validation images where the detector is to be deployed.

    Returns {"attacks": [...], "rows": [...], "adaptive": [...], ...}. A row is a detector fitted to one attack and
    tested on one, at one threshold ("half": probability 1/2, as in the paper; "validation": `false_alarms` of the
    natural images of set I) and counting all adversarial images or only those right before and wrong after ("scope"),
    "own" where the threshold is the detector's own. Its figures are `detection.figures`, and "noisy_false_alarms":
    the share of natural images flagged when random noise of the attack's l2 norm is added. What an attack gives back
    untouched (clean errors, for most) is natural, and no adversarial image. Raises UserError for sets that are too
    small, and for an attack that changes no image.
    """
    protocol, progress = protocol or Protocol(), progress or _silent
    (x, y), system = images, _alone(classifier)
    made = {
        n: crafted(system, a, t, x, y, derive(protocol.seed, n), partial(progress, f"attack {n}"))
        for n, (a, t) in attacks.items()
    }
    noise = {name: noisy(x, found, derive(protocol.seed, name, "noise")) for name, found in made.items()}
    scorers = {name: spec.scorer(classifier, *train, protocol.seed) for name, spec in detectors.items()}
    sets = [split(len(x), protocol.share, derive(protocol.seed, "sets", k)) for k in range(protocol.splits)]
    rows: list[dict[str, Any]] = []
    adaptive: list[dict[str, Any]] = []
    for name, spec in detectors.items():
        seen = Seen(classifier, scorers[name], x, y, made, noise)
        for number, fitted_on in enumerate(attacks):
            progress(f"detector {name}", number, len(attacks))
            fits = [spec.regress(*seen.fitting(fitted_on, first)) for first, _ in sets]
            for tested_on in attacks:
                each = [seen.judged(tested_on, fit, second) for fit, (_, second) in zip(fits, sets, strict=True)]
                named = {"detector": name, "fitted_on": fitted_on, "tested_on": tested_on}
                rows += [{**named, "familiar": fitted_on == tested_on, **row} for row in rows_of(each, spec)]
            if protocol.adaptive is not None and scorers[name].deployable:
                whole = FittedDetector(spec, classifier, scorers[name], fits[0])
                named = {"detector": name, "fitted_on": fitted_on}
                adaptive += [{**named, **row} for row in _adaptive(whole, attacks, (x, y), sets[0][1], protocol)]
    return {
        "protocol": "ER: set I fits, set II judges", "set_1": len(sets[0][0]), "set_2": len(sets[0][1]),
        "splits": protocol.splits, "seed": protocol.seed, "classifier": system.hash(),
        "attacks": [_attack_row(system, n, t, x, y, made[n]) for n, (_, t) in attacks.items()],
        "rows": rows, "adaptive": adaptive,
    }  # fmt: skip


def deployable(
    classifier: Classifier,
    detectors: Mapping[str, DetectorSpec],
    attack: tuple[Attack, ThreatModel],
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, FittedDetector]:
    """The detectors as they would be deployed: regression and threshold from validation images, all of them.

    Args are those of `run_protocol`, but for the one `attack` fitted to and the `validation` images and labels, which
    no weight was fitted to and no figure is of. A detector whose scores need the clean originals is left out.
    """
    (x, y), progress = validation, progress or _silent
    found = crafted(
        _alone(classifier), *attack, x, y, derive(seed, "deployed"), partial(progress, "validation images")
    )
    fitted = {}
    for number, (name, spec) in enumerate(detectors.items()):
        progress(f"detector {name} on validation images", number, len(detectors))
        scorer = spec.scorer(classifier, *train, seed)
        if scorer.deployable:
            natural, adversarial = (scores_of(scorer, classifier, images, x)[0] for images in (x, found))
            changed = (found != x).flatten(1).any(1)
            fitted[name] = FittedDetector(spec, classifier, scorer, spec.regress(natural, adversarial[changed]))
    return fitted


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


# --- images ---------------------------------------------------------------------------------------------------


def split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of set I and set II, disjoint, all of 0..n-1. Raises UserError if one would be empty."""
    first = round(share * n)
    if not 0 < first < n:
        raise UserError(f"a share of {share:g} of {n} images leaves one of the two sets empty")
    order = torch.randperm(n, generator=generator("detection sets", seed))
    return order[:first].sort().values, order[first:].sort().values


def crafted(
    system: TorchSystem, attack: Attack, threat: ThreatModel, x: Tensor, y: Tensor, seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """What the attack makes of every image, within the threat model; true labels."""
    parts = []
    for first in range(0, len(x), CHUNK):
        if progress is not None:
            progress(first, len(x))
        rows = slice(first, first + CHUNK)
        with all_finite(system, f"images that {type(attack).__name__} tried"):
            found = attack(system, x[rows], untargeted(y[rows]), threat, derive(seed, first)).x_adv
        parts.append(threat.project(found, x[rows]))
    return torch.cat(parts)


def noisy(x: Tensor, x_adv: Tensor, seed: int) -> Tensor:
    """Natural images with Gaussian noise of the same l2 norm as each one's perturbation, cut to [0, 1]."""
    direction = torch.randn(x.shape, generator=generator("matched noise", seed)).to(x)
    norms = [v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (x_adv - x, direction)]
    moved: Tensor = x + direction * norms[0] / norms[1]
    return moved.clamp(0, 1)


def _alone(classifier: Classifier) -> TorchSystem:
    return TorchSystem(classifier, input_shape=classifier.input_shape, num_classes=classifier.num_classes)


def _attack_row(
    system: TorchSystem, name: str, threat: ThreatModel, x: Tensor, y: Tensor, x_adv: Tensor
) -> dict[str, Any]:
    """How hard the attack is on the classifier alone; the norm per pixel is the ER paper's "normalised l2"."""
    with system.frozen():
        clean, after = (
            torch.cat([system.decide(v[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]) for v in (x, x_adv)
        )
    l2 = (x_adv - x).flatten(1).norm(dim=1)
    return {
        "attack": name, "threat": str(threat), "n": len(x), "clean": float((clean == y).float().mean()),
        "accuracy": float((after == y).float().mean()), "l2_mean": float(l2.mean()),
        "l2_per_pixel": float(l2.mean()) / (x.shape[2] * x.shape[3]),
    }  # fmt: skip


# --- the attack that knows the detector -----------------------------------------------------------------------


def _adaptive(
    detector: FittedDetector, attacks: Attacks, images: tuple[Tensor, Tensor], second: Tensor, protocol: Protocol
) -> list[dict[str, Any]]:
    """What is left of the whole system under the joint attack, in every threat model of the attacks it can work in.

    `natural` is the whole system's accuracy before: accepted and classified correctly. `accuracy` counts those of
    them that are rejected or classified correctly after, so that rejecting everything is worth nothing. `evaded` is
    the attack's own share of successes, `rejected` what is flagged in the end.
    """
    classifier, joint = detector.classifier, protocol.adaptive
    assert joint is not None
    system = DetectorSystem(
        classifier, detector, input_shape=classifier.input_shape, num_classes=classifier.num_classes
    )
    chosen = second[: protocol.adaptive_images]
    x, y = images[0][chosen], images[1][chosen]
    right = system.decide(x) == y
    rows = []
    for threat in dict.fromkeys(threat for _, threat in attacks.values()):
        result = joint(system, x, untargeted(y), threat, derive(protocol.seed, "joint", threat))
        rows.append({
            "attack": "joint", "threat": str(threat), "n": len(x),
            "natural": float(right.float().mean()),
            "evaded": float(result.success.float().mean()),
            "accuracy": float((right & ~result.success).float().mean()),
            "rejected": float((result.prediction < 0).float().mean()),
        })  # fmt: skip
    return rows


# --- files ----------------------------------------------------------------------------------------------------


def save_detector(folder: Path, name: str, detector: FittedDetector, **facts: Any) -> None:
    """Write weights.safetensors and card.json; `name` is the registered one, `facts` go into the card (JSON-able)."""
    card = {
        "kind": "detector", "name": name, **detector.spec,
        "classifier": _alone(detector.classifier).hash(), **facts,
    }  # fmt: skip
    save_artifact(folder, {"scorer": detector.scorer, "regression": detector.regression}, card)


def load_detector(folder: Path, classifier: Classifier) -> FittedDetector:
    """The detector of that folder for the classifier that it was fitted to. Raises UserError for any other."""
    tensors, card = load_artifact(folder)
    if card.get("kind") != "detector":
        raise UserError(f"{folder} does not hold a detector")
    if card["classifier"] != _alone(classifier).hash():
        raise UserError(f"the detector in {folder} was fitted to another classifier: fit it again")
    device = _alone(classifier).device
    spec: DetectorSpec = registry.resolve("detector", card["name"])(**card["options"])
    scorer, regression = spec.restore(tensors["scorer"]).to(device), Regression(**tensors["regression"]).to(device)
    return FittedDetector(spec, classifier, scorer, regression)
