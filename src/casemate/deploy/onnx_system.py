"""An .onnx file as a system that can be evaluated: it offers scores and labels, and no gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.deploy.metadata import Layout, Metadata
from casemate.deploy.session import Device, first_line, open_session
from casemate.errors import UserError
from casemate.system import REJECT, Offer, System, View
from casemate.threat import TOLERANCE

DETECTOR = "detector"
MOST = 500  # images per run of the session
SCORES: frozenset[Offer] = frozenset({"scores", "labels"})


@dataclass(frozen=True)
class _Input:
    name: str
    shape: tuple[int, int, int]  # C, H, W
    channels_last: bool
    uint8: bool
    batch: int | None  # None: any


class OnnxSystem(System):
    """What an .onnx file decides. One of ours says in its metadata what it takes; of any other file the input must be
    one N x C x H x W (or N x H x W x C) tensor of float32 in [0, 1] or uint8 in [0, 255], with fixed C, H and W, and
    an output N x classes of logits (the one named "logits", else the first of that shape).

    `metadata` is None for a foreign file. `provider` says what runs it. Thread-safe.
    """

    def __init__(self, path: Path | str, device: Device = "auto") -> None:
        """Raises UserError if `path` is not a model that can be used here, or no GPU can be used and is asked for."""
        self.path = Path(path)
        self.session = open_session(self.path, device)
        self.provider: str = self.session.get_providers()[0]
        self.metadata = Metadata.read(self.session.get_modelmeta().custom_metadata_map, self.path)
        self.input = _read_input(self.session, self.path, self.metadata)
        self.name, self.input_shape = self.path.stem, self.input.shape
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]
        self.scores, self.num_classes = self._trial()
        self.offers = SCORES
        self.rejects = self.metadata is not None and bool(self.metadata.detector)
        self.changes_inference = self.metadata is not None and (self.metadata.form != "plain" or self.rejects)
        # its answers differ from run to run: an attack cannot average over draws that it is not offered
        self.stochastic = self.metadata is not None and self.metadata.ensemble.get("noise") == "random"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the file has them."""
        return None if self.metadata is None else self.metadata.about.classes

    def logits(self, x: Tensor) -> Tensor:
        """N x classes, on the device of `x`; float32 in [0, 1], any N. Grey levels are rounded for a uint8 input."""
        found = self.run(x.detach().cpu().numpy(), [self.scores])[self.scores]
        return torch.from_numpy(found).to(x.device)

    def run(self, images: np.ndarray, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named outputs (by default all) for N x C x H x W float32 images in [0, 1], any N."""
        names = list(outputs or self.outputs)
        if images.shape[1:] != self.input.shape or images.ndim != 4:
            raise UserError(f"{self.path} takes images {self.input.shape}, not {tuple(images.shape[1:])}")
        size = self.input.batch or MOST
        parts = [self._batch(images[at : at + size], names) for at in range(0, max(len(images), 1), size)]
        return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}

    def decide(self, x: Tensor) -> Tensor:
        """(N,) labels; -1 where the file's detector flags the image."""
        if not self.rejects:
            return super().decide(x)
        found = self.run(x.detach().cpu().numpy(), [self.scores, DETECTOR])
        labels = torch.from_numpy(found[self.scores].argmax(1))
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

    def _batch(self, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
        count = len(images)
        if self.input.batch is not None and count < self.input.batch:
            images = np.concatenate([images, np.zeros((self.input.batch - count, *images.shape[1:]), images.dtype)])
        if self.input.uint8:
            images = np.rint(images * 255).astype(np.uint8)
        if self.input.channels_last:
            images = images.transpose(0, 2, 3, 1)
        if images.dtype != np.uint8:
            images = images.astype(np.float32, copy=False)
        found = self.session.run(names, {self.input.name: np.ascontiguousarray(images)})
        return [part[:count] for part in found]

    def _trial(self) -> tuple[str, int]:
        """(name of the output with the logits, number of classes), from one run on two black images."""
        try:
            found = self.run(np.zeros((2, *self.input.shape), np.float32))
        except UserError:
            raise
        except Exception as error:  # the runtime's exceptions share no base but this
            raise UserError(f"{self.path} does not run on images {self.input.shape}: {first_line(error)}") from None
        scores = {n: v for n, v in found.items() if v.ndim == 2 and v.shape[0] == 2 and v.dtype == np.float32}
        if not scores:
            raise UserError(f"{self.path} has no output of N x classes float32 logits; outputs: {', '.join(found)}")
        name = "logits" if "logits" in scores else next(iter(scores))
        if self.metadata is not None and scores[name].shape[1] != len(self.metadata.about.classes):
            raise UserError(f"{self.path}: its metadata name {len(self.metadata.about.classes)} classes and it has "
                            f"{scores[name].shape[1]}; export it again")  # fmt: skip
        return name, int(scores[name].shape[1])


def _read_input(session: Any, path: Path, metadata: Metadata | None) -> _Input:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise UserError(f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); one image is needed")
    found = inputs[0]
    kind = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}.get(found.type)
    if kind is None or len(found.shape) != 4:
        raise UserError(
            f"{path}: input {found.name!r} is {found.type} {found.shape}; needed is N x C x H x W float32 in [0, 1] "
            "or uint8 in [0, 255]"
        )
    batch, *rest = found.shape
    if not all(isinstance(size, int) and size > 0 for size in rest):
        raise UserError(f"{path}: input {found.name!r} is {found.shape}; channels, height and width must be fixed")
    layout: Layout | None = None if metadata is None else metadata.layout
    channels_last = layout == "uint8-nhwc" if layout else _channels_last(rest, path, found.name)
    shape = (rest[2], rest[0], rest[1]) if channels_last else (rest[0], rest[1], rest[2])
    if metadata is not None and shape != metadata.input_shape:
        raise UserError(f"{path}: its metadata say {metadata.input_shape} and it takes {shape}; export it again")
    return _Input(found.name, shape, channels_last, kind == "uint8", batch if isinstance(batch, int) else None)


def _channels_last(sizes: list[int], path: Path, name: str) -> bool:
    first, last = sizes[0] in (1, 3), sizes[2] in (1, 3)
    if first == last:
        raise UserError(f"{path}: cannot tell where the channels of input {name!r} {sizes} are; needed are 1 or 3, "
                        "first or last")  # fmt: skip
    return last


def check_range(images: np.ndarray) -> None:
    """Raises UserError unless every value is in [0, 1]."""
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise UserError(f"images must be floats in [0, 1] or uint8, and these reach from {low:g} to {high:g}")
