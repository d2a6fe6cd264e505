"""Standard training: cross-entropy on clean images. The baseline that every attack breaks."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.fields import spec
from casemate.trainable import Context, Update


@spec
class Standard(Defense):
    """Minimise CE(f(x), y). One forward pass and one backward pass per batch."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x).float(), y))
