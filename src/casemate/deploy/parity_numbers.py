"""The numbers of a parity report: an exported file and its PyTorch system compared part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.deploy.sides import Sides, readout
from casemate.purification.imt import IMT

BATCH = 250
SCORE, LOGITS = 2e-5, 2e-5  # the latter relative to the largest logit
SIGNS, COSINE = 1e-4, 0.999
MOVE, EDGE = 1e-6, 1e-5  # in pixel units; how close to the band's edge a score may round to the other side
RELAXED = 4  # times PyTorch's own float32 error, for very deep networks
NOISE = 0.005  # of the images, beside twice what two answers of PyTorch differ in


@dataclass(frozen=True)
class Labelled:
    """Images, uint8 N x H x W x C or float32 N x C x H x W in [0, 1], and their labels (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, count: int | None = None) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(float32 N x C x H x W in [0, 1], labels) of the first `count`."""
        for at in range(0, count or len(self), BATCH):
            some = slice(at, min(at + BATCH, count or len(self)))
            x = torch.from_numpy(np.array(self.images[some], order="C"))
            if x.dtype == torch.uint8:
                x = x.permute(0, 3, 1, 2).contiguous().float() / 255
            yield x, self.labels[some]


Check = dict[str, Any]


def check(name: str, value: float, bound: float, detail: str, *, at_least: bool = False) -> Check:
    # written so that NaN fails
    passed = value >= bound if at_least else value <= bound
    return {
        "name": name, "value": float(value), "bound": float(bound), "at_least": at_least, "passed": bool(passed),
        "detail": detail,
    }  # fmt: skip


class _Largest(dict[str, float]):
    """Running maxima by name; NaN stays."""

    def see(self, name: str, values: Tensor) -> None:
        value = float(values.max()) if values.numel() else 0.0
        if not value <= self.get(name, -np.inf):
            self[name] = value


def _logit_check(largest: _Largest) -> Check:
    bound = max(LOGITS * largest["logit"], RELAXED * largest["logits torch"])
    return check(
        "logits", largest["logits"], bound, "largest difference of logits on the same images; 2e-5 of the largest "
        "logit, or 4 times PyTorch's own float32 error",
    )  # fmt: skip


def _see_logits(sides: Sides, largest: _Largest, x: Tensor, logits: Tensor) -> None:
    single, double = sides.classify(x)
    largest.see("logits", (logits - single).abs())
    largest.see("logits torch", (single - double).abs())
    largest.see("logit", single.abs())


def plain_checks(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
    largest = _Largest()
    for x, _ in test.batches(n):
        found = sides.onnx(x)
        _see_logits(sides, largest, sides.seen(x), found["logits"])
        largest.see("probabilities", (found["probabilities"] - found["logits"].softmax(1)).abs())
    figures["largest"] = dict(largest)
    return [_logit_check(largest), _softmax_check(largest)]


def wavering(share: float, n: int) -> float:
    """In how many of `n` images, as a share, two noisy answers may differ where `share` was seen to: twice that, as
    one of the two has noise of another kind, and three standard errors."""
    return 2 * share + 3 * math.sqrt(share * (1 - share) / n)


def noise_checks(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
    """Of a file that draws its own noise: no number of PyTorch's can come back, so answers are compared with what two
    answers of PyTorch differ in."""
    largest, differ, differ_torch, same = _Largest(), 0, 0, 0
    for x, _ in test.batches(n):
        found, again = sides.onnx(x), sides.onnx(x)
        first, second = (logits.argmax(1) for logits in sides.answers(sides.seen(x)))
        differ += int((found["logits"].argmax(1) != first).sum())
        differ_torch += int((first != second).sum())
        same += int((found["logits"] == again["logits"]).all(1).sum())
        largest.see("probabilities", (found["probabilities"] - found["logits"].softmax(1)).abs())
    figures["labels"] = {"differ": differ / n, "differ_torch": differ_torch / n}
    return [
        check(
            "labels", differ / n, wavering(differ_torch / n, n) + NOISE,
            "share of images with another label than PyTorch's; twice what two of its answers differ in, three "
            "standard errors, and 0.005",
        ),
        check("repeats", same / n, 0.0, "share of images whose logits come back the same from a second run"),
        _softmax_check(largest),
    ]  # fmt: skip


def detector_check(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> Check:
    """The detector's log odds, less its threshold."""
    largest = _Largest()
    for x, _ in test.batches(n):
        single, double = sides.odds(sides.seen(x))
        largest.see("odds", (sides.onnx(x, "detector")["detector"] - single).abs())
        largest.see("odds torch", (single - double).abs())
        largest.see("size", single.abs())
    figures["detector"] = dict(largest)
    return check(
        "detector", largest["odds"], max(SCORE * largest["size"], RELAXED * largest["odds torch"]),
        "largest difference of the detector's log odds; 2e-5 of the largest, or 4 times PyTorch's own float32 error",
    )  # fmt: skip


def imt_checks(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
    assert sides.imt32 is not None and sides.imt64 is not None
    largest, counts, cosines = _Largest(), _Counts(), []
    for x, _ in test.batches(n):
        x = sides.seen(x)
        found = sides.onnx(x)
        g, score, purified = found["gradient"], found["manifold_score"], found["purified"]
        g32, score32 = readout(sides.imt32, x, sides.device)
        g64, score64 = readout(sides.imt64, x.double(), sides.device)
        largest.see("score", (score - score32).abs())
        largest.see("score torch", (score32 - score64).abs())
        _see_logits(sides, largest, purified, found["logits"])
        largest.see("probabilities", (found["probabilities"] - found["logits"].softmax(1)).abs())
        largest.see("move", _move_error(sides.imt32, x, g, score, purified))
        counts.see(g, g32, g64)
        cosines.append(torch.stack([_cosine(g, g64), _cosine(g32, g64)]))
    cosine, cosine32 = torch.cat(cosines, 1).double()
    figures["largest"] = dict(largest)
    figures["gradient"] = {
        **counts.figures(), "cosine_least": float(cosine.min()), "cosine_least_torch": float(cosine32.min()),
        "cosine_below": float((cosine < COSINE).double().mean()),
        "cosine_below_torch": float((cosine32 < COSINE).double().mean()),
    }  # fmt: skip
    parts = [_score_check(largest), _logit_check(largest), _softmax_check(largest)]
    return [*parts, *_gradient_checks(figures["gradient"], n), _move_check(largest)]


def _score_check(largest: _Largest) -> Check:
    bound = max(SCORE, RELAXED * largest["score torch"])
    detail = "largest difference of the manifold score; 2e-5, or 4 times PyTorch's own float32 error"
    return check("score", largest["score"], bound, detail)


def _softmax_check(largest: _Largest) -> Check:
    return check("probabilities", largest["probabilities"], 1e-5, "largest difference to the softmax of the logits")


def _move_check(largest: _Largest) -> Check:
    detail = "largest difference of the purified image to where the file's own gradient and score put it, in pixels"
    return check("move", largest["move"], MOVE, detail)


def _gradient_checks(found: dict[str, float], n: int) -> list[Check]:
    return [
        check(
            "signs", found["signs_differ"], 2 * found["signs_differ_torch"] + SIGNS,
            "share of pixels with another sign of the gradient than in float64; twice PyTorch's in float32 + 1e-4",
        ),
        check(
            "cosine", found["cosine_below"], 2 * found["cosine_below_torch"] + 1 / n,
            "share of images whose gradient has a cosine below 0.999 with float64's; twice PyTorch's, and one image",
        ),
        check(
            "varies", found["corrections_differ"], found["corrections_differ_torch"] / 2,
            "share of pixels at which the corrections of two neighbouring images differ; half of PyTorch's",
            at_least=True,
        ),
    ]  # fmt: skip


def _move_error(imt: IMT, x: Tensor, gradient: Tensor, score: Tensor, purified: Tensor) -> Tensor:
    """Per image: how far the purified image is from where IMT moves with this gradient and score. With several steps,
    how far outside the ball. Images whose score may round to the other side of the band are left out."""
    near = torch.stack([(score - edge).abs() < EDGE for edge in imt.band]).any(0) & (imt.rule == "interval")
    reach = (imt.radius * imt.strength(torch.logit(score.double())).float()).view(-1, 1, 1, 1)
    if imt.steps == 1:
        error = (purified - imt.move(x, gradient, x, reach)).abs()
    else:
        error = ((purified - x).abs() - reach).clamp_min(0)
    return error.flatten(1).amax(1)[~near]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per image, with lengths scaled away; two zero gradients agree, a zero and another do not."""
    a, b = (_unit(g.flatten(1).double()) for g in (a, b))
    both_zero = ~(a.any(1) | b.any(1))
    cosine: Tensor = torch.where(both_zero, 1.0, (a * b).sum(1))
    return cosine


def _unit(g: Tensor) -> Tensor:
    top = g.abs().amax(1, keepdim=True)
    g = g / torch.where(top > 0, top, 1.0)
    unit: Tensor = g / g.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit


class _Counts:
    """Of gradient signs, over all pixels."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.pixels = self.images = self.pairs = 0

    def see(self, g: Tensor, g32: Tensor, g64: Tensor) -> None:
        self.pixels += g.numel()
        self.images += len(g)
        self.pairs += (len(g) - 1) * g[0].numel()
        signs = {"": g.sign(), "_torch": g32.sign()}
        for side, sign in signs.items():
            self._add(f"signs_differ{side}", sign != g64.sign())
            self._add(f"corrections_differ{side}", sign[1:] != sign[:-1])
            self._add(f"zero_pixels{side}", sign == 0)
            self._add(f"zero_images{side}", (sign == 0).flatten(1).all(1))

    def _add(self, name: str, hits: Tensor) -> None:
        self.total[name] = self.total.get(name, 0) + float(hits.sum())

    def figures(self) -> dict[str, float]:
        """Shares of pixels, pairs of pixels and images."""
        by = {"signs": self.pixels, "zero_pixels": self.pixels, "zero_images": self.images, "corrections": self.pairs}
        return {
            name: value / max(1, next(count for key, count in by.items() if name.startswith(key)))
            for name, value in self.total.items()
        }


def batch_check(sides: Sides, test: Labelled) -> Check:
    """The first images one by one and together: what is not the purified image's must not depend on the batch."""
    x = next(test.batches(min(5, len(test))))[0]
    name = "manifold_score" if sides.imt32 else "logits"
    together = sides.onnx(x, name)[name]
    alone = torch.cat([sides.onnx(x[at : at + 1], name)[name] for at in range(len(x))])
    bound = max(SCORE, LOGITS * float(together.abs().max()))
    return check(
        "batch", float((together - alone).abs().max()), bound, f"{name} of 5 images, one by one and together"
    )
