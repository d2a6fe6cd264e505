"""An .onnx file as a system that can be evaluated: it offers scores and labels, and no gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from casemate.deploy.runtime import OnnxModel
from casemate.deploy.session import Device
from casemate.system import REJECT, Offer, System, View

DETECTOR = "detector"
SCORES: frozenset[Offer] = frozenset({"scores", "labels"})


class OnnxSystem(System):
    """What an .onnx file decides; see `OnnxModel` for the files that will do.

    `metadata` is None for a foreign file. `provider` says what runs it. Thread-safe.
    """

    def __init__(self, path: Path | str, device: Device = "auto") -> None:
        """Raises UserError if `path` is not a model that can be used here, or no GPU can be used and is asked for."""
        self.model = OnnxModel(path, device)
        self.path, self.session, self.input = self.model.path, self.model.session, self.model.input
        self.provider, self.metadata = self.model.provider, self.model.metadata
        self.name, self.input_shape = self.path.stem, self.input.shape
        self.num_classes, self.outputs, self.scores = self.model.num_classes, self.model.outputs, self.model.scores
        self.offers = SCORES
        self.rejects = self.metadata is not None and bool(self.metadata.detector)
        self.changes_inference = self.metadata is not None and (self.metadata.form != "plain" or self.rejects)
        # its answers differ from run to run: an attack cannot average over draws that it is not offered
        self.stochastic = self.metadata is not None and self.metadata.ensemble.get("noise") == "random"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the file has them."""
        return self.model.classes

    def logits(self, x: Tensor) -> Tensor:
        """N x classes, on the device of `x`; float32 in [0, 1], any N. Grey levels are rounded for a uint8 input."""
        found = self.run(x.detach().cpu().numpy(), [self.scores])[self.scores]
        return torch.from_numpy(found).to(x.device)

    def run(self, images: np.ndarray, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named outputs (by default all) for N x C x H x W float32 images in [0, 1], any N."""
        return self.model.run(images, outputs)

    def decide(self, x: Tensor) -> Tensor:
        """(N,) labels; -1 where the file's detector flags the image."""
        if not self.rejects:
            return super().decide(x)
        found = self.run(x.detach().cpu().numpy(), [self.model.scores, DETECTOR])
        labels = torch.from_numpy(found[self.model.scores].argmax(1))
        return torch.where(torch.from_numpy(found[DETECTOR]) > 0, REJECT, labels).to(x.device)

    def views(self) -> dict[str, View]:
        """ "adaptive" is what the file answers; "static", too, where nothing but a classifier is in it. It is what
        the file decides, unless a detector has a say or the answer is noisy."""
        exact = not (self.rejects or self.stochastic)
        adaptive = View("adaptive", self.logits, exact, SCORES, (1, 0), self.decide)
        if self.changes_inference:
            return {"adaptive": adaptive}
        return {"static": View("static", self.logits, True, SCORES, (1, 0)), "adaptive": adaptive}

    def hash(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
