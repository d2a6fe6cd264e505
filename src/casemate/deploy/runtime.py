"""An .onnx file in ONNX Runtime: what it takes and gives, checked once by a run. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from casemate.deploy.metadata import Layout, Metadata
from casemate.deploy.session import Device, open_session
from casemate.errors import UserError, first_line

MOST = 500  # images per run of the session
DETECTOR = "detector"
"""An output of ours, (N,): the image is to be rejected where it is above 0."""
TOLERANCE = 1e-6  # as in casemate.threat, which needs PyTorch


@dataclass(frozen=True)
class Input:
    """What the file takes: `shape` is (C, H, W) whatever the layout; `batch` is None where any number will do."""

    name: str
    shape: tuple[int, int, int]
    channels_last: bool
    uint8: bool
    batch: int | None

    @property
    def native(self) -> tuple[int, int, int]:
        """The shape of one image as the file takes it."""
        return (self.shape[1], self.shape[2], self.shape[0]) if self.channels_last else self.shape


@dataclass(frozen=True)
class Output:
    """What the file gives: `shape` without the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class OnnxModel:
    """One of ours says in its metadata what it takes; of any other file the input must be one N x C x H x W (or
    N x H x W x C) tensor of float32 in [0, 1] or uint8 in [0, 255], with fixed C, H and W, and an output N x classes
    of logits (the one named "logits", else the first of that shape).

    `metadata` is None for a foreign file. `provider` says what runs it. Thread-safe.
    """

    def __init__(self, path: Path | str, device: Device = "auto", *, threads: int | None = None) -> None:
        """Raises UserError if `path` is not a model that can be used here, or no GPU can be used and is asked for."""
        self.path = Path(path)
        self.session = open_session(self.path, device, threads=threads)
        self.provider: str = self.session.get_providers()[0]
        self.metadata = Metadata.read(self.session.get_modelmeta().custom_metadata_map, self.path)
        self.input = _read_input(self.session, self.path, self.metadata)
        self.outputs: list[str] = [output.name for output in self.session.get_outputs()]
        self.scores, self.per_image = self._trial()
        self.num_classes = next(output.shape[0] for output in self.per_image if output.name == self.scores)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the file has them."""
        return None if self.metadata is None else self.metadata.about.classes

    @property
    def rejects(self) -> bool:
        """Whether a detector is in the file, which is then one of ours."""
        return self.metadata is not None and DETECTOR in self.outputs

    def run(self, images: np.ndarray, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named outputs (by default all) for N x C x H x W float32 images in [0, 1], any N."""
        if images.shape[1:] != self.input.shape or images.ndim != 4:
            raise UserError(f"{self.path} takes images {self.input.shape}, not {tuple(images.shape[1:])}")
        return self.run_native(self.to_native(images), outputs)

    def run_native(self, images: np.ndarray, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As `run`, for images in the file's own layout and type."""
        names = list(outputs or self.outputs)
        size = self.input.batch or MOST
        parts = [self._batch(images[at : at + size], names) for at in range(0, max(len(images), 1), size)]
        if len(parts) == 1:
            return dict(zip(names, parts[0], strict=True))
        return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}

    def to_native(self, images: np.ndarray) -> np.ndarray:
        """N x C x H x W float32 in [0, 1] in the file's own layout and type; grey levels are rounded for uint8."""
        if self.input.uint8:
            images = np.rint(images * 255).astype(np.uint8)
        if self.input.channels_last:
            images = images.transpose(0, 2, 3, 1)
        if images.dtype != np.uint8:
            images = images.astype(np.float32, copy=False)
        return np.ascontiguousarray(images)

    def _batch(self, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
        count = len(images)
        if self.input.batch is not None and count < self.input.batch:
            images = np.concatenate([images, np.zeros((self.input.batch - count, *images.shape[1:]), images.dtype)])
        found = self.session.run(names, {self.input.name: images})
        return [part[:count] for part in found]

    def _trial(self) -> tuple[str, tuple[Output, ...]]:
        """(name of the output with the logits, the outputs that have a row for each image), from one run on two
        black images."""
        try:
            found = self.run(np.zeros((2, *self.input.shape), np.float32))
        except UserError:
            raise
        except Exception as error:  # the runtime's exceptions share no base but this
            raise UserError(f"{self.path} does not run on images {self.input.shape}: {first_line(error)}") from None
        rows = tuple(Output(n, v.shape[1:], v.dtype) for n, v in found.items() if v.ndim and len(v) == 2)
        scores = {output.name: output.shape[0] for output in rows if len(output.shape) == 1
                  and output.dtype == np.float32}  # fmt: skip
        if not scores:
            raise UserError(f"{self.path} has no output of N x classes float32 logits; outputs: {', '.join(found)}")
        name = "logits" if "logits" in scores else next(iter(scores))
        if self.metadata is not None and scores[name] != len(self.metadata.about.classes):
            raise UserError(f"{self.path}: its metadata name {len(self.metadata.about.classes)} classes and it has "
                            f"{scores[name]}; export it again")  # fmt: skip
        return name, rows


def _read_input(session: Any, path: Path, metadata: Metadata | None) -> Input:
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
    return Input(found.name, shape, channels_last, kind == "uint8", batch if isinstance(batch, int) else None)


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
