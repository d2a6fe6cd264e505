"""E-CLA (Li et al.): the encoder and the classifier of ER-Classifier, without its regulariser: an ablation."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.embedding import EncoderAndHead, require_batch
from casemate.fields import spec
from casemate.trainable import Context, Update


@spec
class ECLA(EncoderAndHead):
    """Minimise CE(C(Q(x)), y) on clean images: one forward pass and one weight gradient per batch."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        require_batch(classifier, x)
        yield Update(("encoder", "head"), lambda: F.cross_entropy(classifier(x).float(), y))
