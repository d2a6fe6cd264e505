"""Clean and robust accuracy on the validation split: the only numbers that selection sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from casemate.attacks.ascent import ascend, l2_step, sign_step
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.threat import Goal
from casemate.trainable import Task, Trainable
from casemate.training.inputs import TrainingData
from casemate.training.precision import exact

STEPS = 10
CHUNK = 500


def can_validate(method: Trainable) -> bool:
    """Whether the method says how it is used at inference: defenses do, attacks that learn do not."""
    return hasattr(method, "system") and hasattr(method, "inference_modes")


def validate(
    method: Any,
    task: Task,
    modules: Mapping[str, nn.Module],
    data: TrainingData,
    *,
    seed: int,
    device: torch.device,
    between: Callable[[], None],
) -> dict[str, float]:
    """`val_clean` and `val_robust` of the classifier inside the primary system, as fractions, in float32.

    The attack is PGD-10 on cross-entropy in the task's threat model: one uniform start, step size radius / 4 (that is
    2/255 at 8/255, as Rice et al. 2020). Its draws depend on the seed alone, so epochs are compared on equal terms. A
    clean error counts as a failure. `between` is called before every chunk of images.
    """
    threat = task.threat
    system = method.system(
        dict(modules),
        method.inference_modes[0],
        input_shape=task.input_shape,
        num_classes=task.num_classes,
        threat=threat,
    )
    logits = system.views()["static"].logits
    clean = robust = 0
    with system.frozen(), exact(device), torch.no_grad():
        for first in range(0, len(data), CHUNK):
            between()
            indices = torch.arange(first, min(first + CHUNK, len(data)), device=data.labels.device)
            x, goal = data.x(indices), Goal(data.labels[indices])
            right = logits(x).argmax(1) == goal.labels
            start = threat.project(threat.random_start(x, generator(seed, "validate", first)), x)
            x_adv = ascend(
                lambda at, goal=goal: cross_entropy(logits(at), goal),  # type: ignore[misc]
                x,
                start,
                threat,
                steps=STEPS,
                step_size=threat.radius / 4,
                direction=sign_step if threat.norm == "linf" else l2_step,
            )
            clean += int(right.sum())
            robust += int((right & (logits(x_adv).argmax(1) == goal.labels)).sum())
    return {"val_clean": clean / len(data), "val_robust": robust / len(data)}
