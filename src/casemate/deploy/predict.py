"""Prediction with an exported file: what `casemate.load` gives. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from casemate.deploy import card
from casemate.deploy.card import Card
from casemate.deploy.runtime import DETECTOR, OnnxModel, check_range
from casemate.deploy.session import Device
from casemate.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """For N images. labels (N,) int64; names (N,) class names; probabilities and logits N x classes float32;
    manifold_score (N,) float32 in [0, 1], how clean each image looks to the critic, where the file has one. rejected
    (N,) bool: images that the file's detector flags, where it has one; their labels are not to be used."""

    labels: np.ndarray
    names: tuple[str, ...]
    probabilities: np.ndarray
    logits: np.ndarray
    manifold_score: np.ndarray | None
    rejected: np.ndarray | None


class Predictor:
    """A model file, its hash verified against the card beside it. `predict` may be called from several threads at
    once.

    provider: what runs it, such as "CUDAExecutionProvider". card: None where the file has none, that is where it was
    not released; then nothing says whether it is the file that was tested.
    """

    def __init__(
        self, path: Path | str, device: Device = "auto", *, threads: int | None = None, told: Card | None = None
    ) -> None:
        """`path`: a file, or a released folder. `told`: the file's card, where it is kept elsewhere than beside it.
        Raises UserError if the file is not usable or not its card's."""
        path = card.model_path(path)
        self.card: Card | None = card.verify(path) if card.find(path) else None
        if told is not None:
            self.card = card.hold(path, told, "its card")
        self.model = OnnxModel(path, device, threads=threads)
        classes = self.model.classes
        self.classes = classes or tuple(str(number) for number in range(self.model.num_classes))

    @property
    def provider(self) -> str:
        return self.model.provider

    def predict(self, images: np.ndarray) -> Prediction:
        """images: uint8 in [0, 255] or float in [0, 1]; one image or a batch; channels first or last, or without a
        channel axis where the model takes one channel. Raises UserError if they do not fit the model."""
        batch = self._batch(np.asarray(images))
        wanted = ("logits", "probabilities", "manifold_score", *((DETECTOR,) if self.model.rejects else ()))
        names = [name for name in wanted if name in self.model.outputs]
        scores = self.model.run(batch, names) if "logits" in names else {}
        logits = scores["logits"] if scores else self.model.run(batch)[self.model.scores]
        labels = logits.argmax(1).astype(np.int64)
        return Prediction(
            labels, tuple(self.classes[label] for label in labels), scores.get("probabilities", softmax(logits)),
            logits, scores.get("manifold_score"), scores[DETECTOR] > 0 if self.model.rejects else None,
        )  # fmt: skip

    def _batch(self, images: np.ndarray) -> np.ndarray:
        """N x C x H x W float32 in [0, 1]."""
        channels, height, width = shape = self.model.input.shape
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(255)
        elif np.issubdtype(images.dtype, np.floating):
            images = images.astype(np.float32, copy=False)
            check_range(images)
        else:
            raise UserError(f"images must be uint8 or float, not {images.dtype}")
        forms = {shape: (0, 1, 2), (height, width, channels): (2, 0, 1)}
        for form, order in forms.items():
            if images.shape[-3:] == form and images.ndim in (3, 4):
                batch = images.reshape(-1, *form)
                return np.ascontiguousarray(batch.transpose(0, *(axis + 1 for axis in order)))
        if channels == 1 and images.shape[-2:] == (height, width) and images.ndim in (2, 3):
            return np.ascontiguousarray(images.reshape(-1, *shape))
        raise UserError(f"{self.model.path} takes images {shape} (channels, height, width), not {images.shape}")


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: np.ndarray = powers / powers.sum(1, keepdims=True)
    return result
