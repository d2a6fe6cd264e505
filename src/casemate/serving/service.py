"""A loaded model as a service: its name, its batcher, its counters, and what is said about it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from casemate.deploy.predict import Predictor, softmax
from casemate.deploy.runtime import DETECTOR
from casemate.deploy.session import Device
from casemate.loading import Source, resolve
from casemate.serving.batching import Batcher
from casemate.serving.limits import Limits
from casemate.serving.metrics import Metrics
from casemate.serving.pictures import Picture

TOP = 5


class Tested(BaseModel):
    """What the model was tested at: `radius` in pixel units, images being in [0, 1]. The shares are of images of the
    test set; `robust` is the lowest that the attacks of a `suite` of the evaluation left, and `gate` whether the file
    itself passed the release gate. None where the file has no card."""

    norm: str
    radius: float
    clean: float | None = None
    robust: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    images: int | None = None
    suite: str | None = None
    verdict: str | None = None
    gate: Literal["passed", "failed"] | None = None


class Guess(BaseModel):
    label: int
    name: str = Field(serialization_alias="class")
    probability: float


class Seen(BaseModel):
    """The picture as it came, and what was done to it before the model saw it."""

    width: int
    height: int
    changes: list[str]


class Answer(BaseModel):
    """`manifold_score` in [0, 1]: how clean the picture looks to the model's critic. `rejected`: the model's detector
    flags the picture, so that its class is not to be used. None where the model has no critic, or no detector."""

    label: int
    name: str = Field(serialization_alias="class")
    probability: float
    manifold_score: float | None
    rejected: bool | None
    tested: Tested | None
    top: list[Guess]
    picture: Seen
    model: str
    version: str


class Service:
    """Opened and closed by the application around it; `batcher` runs between."""

    def __init__(
        self, predictor: Predictor, limits: Limits, *, name: str, version: str = "1", registered: str | None = None
    ) -> None:
        self.predictor, self.limits, self.registered = predictor, limits, registered
        self.name, self.version, self.model = name, version, predictor.model
        self.metrics = Metrics()
        self.batcher = Batcher(self._run, limits, self.metrics.batch.observe)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.tested = tested(predictor)
        card, told = predictor.card, self.tested
        threat = f"{told.norm} {told.radius:g}" if told else ""
        self.metrics.model.labels(name, version, card.sha256 if card else "", predictor.provider, threat).set(1)

    @classmethod
    def load(
        cls, model: str | Path, limits: Limits, *, device: Device = "auto", threads: int | None = None,
        name: str | None = None,
    ) -> Service:  # fmt: skip
        """`model` as `casemate.load` takes it. Raises UserError if it cannot be served."""
        source = resolve(model)
        predictor = source.open(device, threads=threads)
        return cls(
            predictor, limits, name=name or _name(source, predictor), version=source.version,
            registered=source.registered,
        )  # fmt: skip

    def open(self) -> AbstractAsyncContextManager[Batcher]:
        return self.batcher

    @property
    def verified(self) -> str:
        """What the file was held against."""
        if self.predictor.card is not None:
            return "card"
        return "registry" if self.registered is not None else "nothing"

    async def tensors(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs for images in the file's own layout and type, and what they say counted."""
        wanted = {*outputs, *self._watched}
        found = await self.batcher.answer(images, sorted(wanted))
        self._count(found)
        return {name: found[name] for name in outputs}

    async def picture(self, picture: Picture) -> Answer:
        """The friendly answer for one picture."""
        found = await self.batcher.answer(self.model.to_native(picture.image), sorted(self._watched))
        self._count(found)
        shares = self._probabilities(found)[0]
        order = np.argsort(-shares, kind="stable")[:TOP]
        top = [Guess(label=int(k), name=self.predictor.classes[k], probability=float(shares[k])) for k in order]
        score = found.get("manifold_score")
        return Answer(
            label=top[0].label, name=top[0].name, probability=top[0].probability, tested=self.tested, top=top,
            manifold_score=None if score is None else float(score[0]),
            rejected=bool(found[DETECTOR][0] > 0) if DETECTOR in found else None, model=self.name,
            version=self.version,
            picture=Seen(width=picture.size[0], height=picture.size[1], changes=list(picture.changes)),
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """The card, or what the file itself says, and what is served."""
        card, metadata = self.predictor.card, self.model.metadata
        return {
            "model": self.name, "version": self.version, "registered": self.registered, "verified": self.verified,
            "provider": self.predictor.provider, "classes": list(self.predictor.classes),
            "tested": None if self.tested is None else self.tested.model_dump(),
            "card": None if card is None else card.model_dump(mode="json", by_alias=True),
            "metadata": None if metadata is None else metadata.strings(),
        }  # fmt: skip

    @property
    def _watched(self) -> set[str]:
        """Outputs that the counters read."""
        wanted = {"probabilities", "manifold_score", self.model.scores} | (
            {DETECTOR} if self.model.rejects else set()
        )
        return wanted & {o.name for o in self.model.per_image}

    def _probabilities(self, found: dict[str, np.ndarray]) -> np.ndarray:
        return found["probabilities"] if "probabilities" in found else softmax(found[self.model.scores])

    def _count(self, found: dict[str, np.ndarray]) -> None:
        shares = self._probabilities(found)
        labels = shares.argmax(1).tolist()
        for row, label in enumerate(labels):
            self.metrics.confidence.observe(float(shares[row, label]))
        for label in set(labels):
            self.metrics.predictions.labels(self.predictor.classes[label]).inc(labels.count(label))
        if self.model.rejects:
            self.metrics.flagged.inc(int((found[DETECTOR] > 0).sum()))
        for score in found.get("manifold_score", ()):
            self.metrics.manifold.observe(float(score))

    def _run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        found = self.model.run_native(images, outputs)
        self.metrics.model_seconds.observe(time.perf_counter() - start)
        return found


def _name(source: Source, predictor: Predictor) -> str:
    metadata = predictor.model.metadata
    own = f"{metadata.about.dataset}-{metadata.about.row}" if metadata and metadata.about.row else source.path.stem
    return re.sub(r"[^\w.-]+", "-", source.registered or own)[:100].strip("-.") or "model"


def tested(predictor: Predictor) -> Tested | None:
    card, metadata = predictor.card, predictor.model.metadata
    if card is None:
        return None if metadata is None else Tested(norm=metadata.about.norm, radius=metadata.about.radius)
    told = Tested(norm=card.threat.norm, radius=card.threat.radius, verdict=card.verdict)
    told.clean = None if card.clean is None else card.clean.accuracy
    if card.gate is not None:
        told.gate = "passed" if card.gate.passed else "failed"
    if card.robust:
        told.suite, worst = min(card.robust.items(), key=lambda item: item[1].accuracy)
        told.robust, told.robust_low, told.robust_high = worst.accuracy, worst.low, worst.high
        told.images = worst.n
    return told
