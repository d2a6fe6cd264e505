"""A classifier that rejects what its detector flags, and what its attackers have."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from casemate.attacks.joint import Joint
from casemate.system import REJECT, Detector, TorchSystem, View


class DetectorSystem(TorchSystem):
    """A classifier behind a detector (see `casemate.system.Detector`): it answers -1 where d is above 0.

    An attack succeeds with a wrong class that is not flagged. The two views are one face, the classifier alone, which
    decides nothing here: attacks on it know nothing of the detector, which is how the papers attack. The adaptive
    attack is the procedure "joint". The logits of `detector.readout` must be the classifier's.
    """

    def __init__(
        self, classifier: nn.Module, detector: Detector, *, input_shape: tuple[int, int, int], num_classes: int,
        name: str = "detector",
    ) -> None:  # fmt: skip
        super().__init__(classifier, input_shape=input_shape, num_classes=num_classes, name=name)
        self.detector: Detector = detector
        self.offers |= {"detector"}
        self.changes_inference = True

    def decide(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            flag, logits = self.detector.readout(x)
            return torch.where(flag > 0, REJECT, logits.argmax(1))

    def views(self) -> dict[str, View]:
        blind = View("static", self.classifier, False, self.offers, system=self)
        return {"static": blind, "adaptive": View("adaptive", self.classifier, False, self.offers, system=self)}

    def adaptive_attacks(self) -> dict[str, Any]:
        return {"joint": Joint()}

    def decision_passes(self) -> tuple[int, int]:
        return self.detector.passes[0], 0

    def hash(self) -> str:
        return hashlib.sha256(f"{super().hash()} {sorted(self.detector.spec.items())}".encode()).hexdigest()[:16]

    def _modules(self) -> list[nn.Module]:
        return [self.classifier, *self.detector.modules]
