"""Does an exported file compute what the PyTorch system computes? Numbers, their bounds, and a verdict.

The purified image is discontinuous in rounding (the sign of the gradient, ReLU masks inside it, the band), so the
parts are compared one by one: the score; the logits given the same purified image; the gradient's signs, with PyTorch
in float64 as referee; the move, given the file's own gradient; and end to end only what is decided, never a largest
difference of logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.deploy.export import ExportOptions, export_system, require_torch
from casemate.deploy.metadata import About, Form
from casemate.deploy.sides import Sides, exact_float32, readout
from casemate.errors import UserError
from casemate.purification.imt import IMT
from casemate.system import System

SCHEMA = 1
BATCH = 250
SCORE, LOGITS = 2e-5, 2e-5  # the latter relative to the largest logit
SIGNS, COSINE = 1e-4, 0.999
MOVE, EDGE = 1e-6, 1e-5  # in pixel units; how close to the band's edge a score may round to the other side
AGREEMENT, ACCURACY = 0.995, 0.002
RELAXED = 4  # times PyTorch's own float32 error, for very deep networks


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


def parity_report(
    system: System, path: Path, test: Labelled, *, adversarial: Labelled | None = None, n: int = 1000
) -> dict[str, Any]:
    """Compare the file at `path` with the system it was exported from, in the form that its metadata name.

    test: the whole test set; the first `n` images of it are compared number by number, all by their predictions.
    adversarial: stored adversarial images, on which the accuracy of both is compared, too.
    Returns {"schema", "form", "n", "sha256", "passed", "checks", "figures"}; a check is {"name", "value", "bound",
    "at_least", "passed", "detail"}: the value must not exceed the bound, or, with at_least, not fall below it.
    """
    sides = Sides(require_torch(system), path)
    n = min(n, len(test))
    figures: dict[str, Any] = {}
    with exact_float32():
        checks = _imt_checks(sides, test, n, figures) if sides.imt32 else _plain_checks(sides, test, n, figures)
        checks.append(_batch_check(sides, test))
        for name, data in (("clean", test), ("adversarial", adversarial)):
            if data is not None and len(data):
                checks += _end_to_end(sides, name, data, figures)
    return {
        "schema": SCHEMA, "form": sides.metadata.form, "n": n,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "passed": all(c["passed"] for c in checks),
        "checks": checks, "figures": figures,
    }  # fmt: skip


def parity_path(path: Path) -> Path:
    """Where `export_with_parity` leaves the report for the file `path`."""
    return path.with_suffix(".parity.json")


def export_with_parity(
    system: System,
    path: Path,
    about: About,
    test: Labelled,
    *,
    adversarial: Labelled | None = None,
    n: int = 1000,
    form: Form | None = None,
    options: ExportOptions | None = None,
) -> dict[str, Any]:
    """Export to `path` if, and only if, the parity report passes. The report is returned, and left beside the file
    (`parity_path`) whether it passed or not. Raises UserError naming the first number that failed; what was at
    `path` before then stays.
    """
    candidate = path.with_name(f".{path.stem}.candidate.onnx")
    try:
        export_system(system, candidate, about, form=form, options=options)
        report = parity_report(system, candidate, test, adversarial=adversarial, n=n)
        _write_json(parity_path(path), report)
        for check in report["checks"]:
            if not check["passed"]:
                raise UserError(
                    f"{path} is not written: parity failed at {check['name']!r} with {check['value']:.3g} against "
                    f"{check['bound']:.3g} ({check['detail']}); see {parity_path(path)}"
                )
        candidate.replace(path)
    finally:
        candidate.unlink(missing_ok=True)
    return report


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def _check(name: str, value: float, bound: float, detail: str, *, at_least: bool = False) -> Check:
    # written so that NaN fails
    passed = value >= bound if at_least else value <= bound
    return {
        "name": name, "value": float(value), "bound": float(bound), "at_least": at_least, "passed": bool(passed),
        "detail": detail,
    }  # fmt: skip


# --- number by number ---------------------------------------------------------------------------------------


class _Largest(dict[str, float]):
    """Running maxima by name; NaN stays."""

    def see(self, name: str, values: Tensor) -> None:
        value = float(values.max()) if values.numel() else 0.0
        if not value <= self.get(name, -np.inf):
            self[name] = value


def _logit_check(largest: _Largest) -> Check:
    bound = max(LOGITS * largest["logit"], RELAXED * largest["logits torch"])
    return _check(
        "logits", largest["logits"], bound, "largest difference of logits on the same images; 2e-5 of the largest "
        "logit, or 4 times PyTorch's own float32 error",
    )  # fmt: skip


def _see_logits(sides: Sides, largest: _Largest, x: Tensor, logits: Tensor) -> None:
    single, double = sides.classify(x)
    largest.see("logits", (logits - single).abs())
    largest.see("logits torch", (single - double).abs())
    largest.see("logit", single.abs())


def _plain_checks(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
    largest = _Largest()
    for x, _ in test.batches(n):
        found = sides.onnx(x)
        _see_logits(sides, largest, sides.seen(x), found["logits"])
        largest.see("probabilities", (found["probabilities"] - found["logits"].softmax(1)).abs())
    figures["largest"] = dict(largest)
    return [_logit_check(largest), _softmax_check(largest)]


def _imt_checks(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
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
    return _check("score", largest["score"], bound, detail)


def _softmax_check(largest: _Largest) -> Check:
    return _check("probabilities", largest["probabilities"], 1e-5, "largest difference to the softmax of the logits")


def _move_check(largest: _Largest) -> Check:
    detail = "largest difference of the purified image to where the file's own gradient and score put it, in pixels"
    return _check("move", largest["move"], MOVE, detail)


def _gradient_checks(found: dict[str, float], n: int) -> list[Check]:
    return [
        _check(
            "signs", found["signs_differ"], 2 * found["signs_differ_torch"] + SIGNS,
            "share of pixels with another sign of the gradient than in float64; twice PyTorch's in float32 + 1e-4",
        ),
        _check(
            "cosine", found["cosine_below"], 2 * found["cosine_below_torch"] + 1 / n,
            "share of images whose gradient has a cosine below 0.999 with float64's; twice PyTorch's, and one image",
        ),
        _check(
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


# --- end to end ---------------------------------------------------------------------------------------------


def _batch_check(sides: Sides, test: Labelled) -> Check:
    """The first images one by one and together: what is not the purified image's must not depend on the batch."""
    x = next(test.batches(min(5, len(test))))[0]
    name = "manifold_score" if sides.imt32 else "logits"
    together = sides.onnx(x, name)[name]
    alone = torch.cat([sides.onnx(x[at : at + 1], name)[name] for at in range(len(x))])
    bound = max(SCORE, LOGITS * float(together.abs().max()))
    return _check(
        "batch", float((together - alone).abs().max()), bound, f"{name} of 5 images, one by one and together"
    )


def _end_to_end(sides: Sides, name: str, data: Labelled, figures: dict[str, Any]) -> list[Check]:
    agreed = right = right_torch = 0
    for x, y in data.batches():
        x, labels = sides.seen(x), torch.tensor(y).long()
        ours, theirs = sides.onnx(x, "logits")["logits"].argmax(1), sides.logits(x).argmax(1)
        agreed += int((ours == theirs).sum())
        right += int((ours == labels).sum())
        right_torch += int((theirs == labels).sum())
    total = len(data)
    figures[name] = {"n": total, "accuracy": right / total, "accuracy_torch": right_torch / total}
    return [
        _check(f"{name} agreement", agreed / total, min(AGREEMENT, 1 - 1 / total),
               f"share of {total} images with the same label", at_least=True),
        _check(f"{name} accuracy", abs(right - right_torch) / total, max(ACCURACY, 1 / total),
               f"difference of the accuracies on {total} images"),
    ]  # fmt: skip
