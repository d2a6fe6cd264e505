"""Does an exported file compute what the PyTorch system computes? Numbers, their bounds, and a verdict.

The purified image is discontinuous in rounding (the sign of the gradient, ReLU masks inside it, the band), so the
parts are compared one by one: the score; the logits given the same purified image; the gradient's signs, with PyTorch
in float64 as referee; the move, given the file's own gradient; and end to end only what is decided, never a largest
difference of logits.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from casemate.deploy.export import ExportOptions, export_system, require_torch
from casemate.deploy.metadata import About, Form
from casemate.deploy.parity_numbers import (
    Check,
    Labelled,
    batch_check,
    check,
    detector_check,
    imt_checks,
    noise_checks,
    plain_checks,
    wavering,
)
from casemate.deploy.sides import Sides, exact_float32
from casemate.errors import UserError
from casemate.system import System

__all__ = ["Labelled", "export_with_parity", "parity_path", "parity_report"]

SCHEMA = 1
AGREEMENT, ACCURACY = 0.995, 0.002


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
        checks = _numbers(sides, test, n, figures)
        for name, data in (("clean", test), ("adversarial", adversarial)):
            if data is not None and len(data):
                checks += _end_to_end(sides, name, data, figures)
    return {
        "schema": SCHEMA, "form": sides.metadata.form, "n": n,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "passed": all(c["passed"] for c in checks),
        "checks": checks, "figures": figures,
    }  # fmt: skip


def _numbers(sides: Sides, test: Labelled, n: int, figures: dict[str, Any]) -> list[Check]:
    if sides.noisy:
        return noise_checks(sides, test, n, figures)
    checks = imt_checks(sides, test, n, figures) if sides.imt32 else plain_checks(sides, test, n, figures)
    if sides.metadata.detector:
        checks.append(detector_check(sides, test, n, figures))
    return [*checks, batch_check(sides, test)]


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
        for made in report["checks"]:
            if not made["passed"]:
                raise UserError(
                    f"{path} is not written: parity failed at {made['name']!r} with {made['value']:.3g} against "
                    f"{made['bound']:.3g} ({made['detail']}); see {parity_path(path)}"
                )
        candidate.replace(path)
    finally:
        candidate.unlink(missing_ok=True)
    return report


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


# --- end to end ---------------------------------------------------------------------------------------------


def _end_to_end(sides: Sides, name: str, data: Labelled, figures: dict[str, Any]) -> list[Check]:
    agreed = right = right_torch = unsteady = 0
    for x, y in data.batches():
        x, labels = sides.seen(x), torch.tensor(y).long()
        ours, theirs = sides.decisions(x), sides.decide(x)
        agreed += int((ours == theirs).sum())
        right += int((ours == labels).sum())
        right_torch += int((theirs == labels).sum())
        if sides.noisy:
            first, second = (logits.argmax(1) for logits in sides.answers(x))
            unsteady += int((first != second).sum())
    total = len(data)
    figures[name] = {"n": total, "accuracy": right / total, "accuracy_torch": right_torch / total}
    agreement = min(AGREEMENT, 1 - 1 / total) - wavering(unsteady / total, total)
    return [
        check(f"{name} agreement", agreed / total, agreement,
              f"share of {total} images with the same label", at_least=True),
        check(f"{name} accuracy", abs(right - right_torch) / total, max(ACCURACY, 1 / total) + unsteady / total,
              f"difference of the accuracies on {total} images"),
    ]  # fmt: skip
