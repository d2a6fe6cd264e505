"""A hand-made profile, as the stages before the report would leave it; and that the report can load it."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from casemate.errors import UserError
from casemate.reporting import ReportInputs

RADII = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]
ATTACKS = [  # name, method, suite, n, forwards, backwards
    ("fgsm", "fgsm", "core", 10_000, 2, 1),
    ("pgd100_ce", "pgd", "core", 10_000, 101, 100),
    ("pgd100_margin", "pgd", "core", 10_000, 101, 100),
    ("pgd40_restarts5", "pgd", "extended", 1_000, 201, 200),
    ("mim40", "mim", "extended", 1_000, 41, 40),
    ("cw_margin", "cw_margin", "extended", 1_000, 101, 100),
    ("transfer_from_standard", "transfer", "extended", 1_000, 1, 0),
    ("pgd_l2", "pgd", "extended", 1_000, 101, 100),
]
LINF = {"norm": "linf", "radius": 0.3, "text": "linf 0.3"}
L2 = {"norm": "l2", "radius": 2.0, "text": "l2 2"}


def rate(accuracy: float, n: int) -> dict[str, Any]:
    """A rate with its 95 % Wilson interval."""
    z = 1.959964
    middle, spread = accuracy + z * z / (2 * n), z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    low, high = ((middle + s * spread) / (1 + z * z / n) for s in (-1, 1))
    return {"accuracy": accuracy, "low": max(0.0, low), "high": min(1.0, high), "n": n}


def cells(view: str, accuracies: list[float]) -> list[dict[str, Any]]:
    """One cell per attack; the lowest accuracy is ok, the others are upper bounds."""
    return [
        {
            "attack": name, "method": method, "spec": {"steps": forwards - 1, "step_size": 0.01}, "view": view,
            "suite": suite, "threat": LINF if name != "pgd_l2" else L2, **rate(accuracy, n),
            "asr": 1 - accuracy, "forwards": forwards, "backwards": backwards,
            "queries": 0, "linf_max": 0.3, "l2_mean": 5.1,
            "verdict": "ok" if accuracy == min(accuracies[:7]) else "upper bound",
        }
        for (name, method, suite, n, forwards, backwards), accuracy in zip(ATTACKS, accuracies, strict=True)
    ]  # fmt: skip


def system(
    name: str, mode: str, clean: float, adaptive: list[float] | None, static: list[float] | None = None, *,
    verdict: str = "ok", incomplete: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A system under all attacks; its worst cases lie a little under its lowest cells."""

    def worst(accuracies: list[float] | None, n: int, attacks: slice) -> dict[str, Any] | None:
        if accuracies is None:
            return None
        names = [a[0] for a in ATTACKS[attacks]]
        low = max(0.0, round(min(accuracies[attacks][:4]) - 0.004, 4))
        return {
            **rate(low, n),
            "attacks": names + [f"{name} (static)" for name in names if static],
            "incomplete": incomplete or [],
        }

    spans = {"core": (10_000, slice(0, 3)), "extended": (1_000, slice(3, 8)), "all": (1_000, slice(0, 8))}
    sweep = [
        clean * (1 - 1 / (1 + math.exp(-(r - (0.36 if adaptive and min(adaptive) > 0.5 else 0.12)) * 26)))
        for r in RADII
    ]
    rates = [rate(a, 1_000) for a in sweep]
    return {
        "name": name, "mode": mode, "primary": "+" not in name, "hash": "9f3a61c2d07be845",
        "clean": rate(clean, 10_000) | {"correct": round(clean * 10_000)}, "changes_inference": static is not None,
        "cells": (cells("adaptive", adaptive) if adaptive else []) + (cells("static", static) if static else []),
        "worst": {
            suite: {"adaptive": worst(adaptive, n, at), "static": worst(static, n, at)}
            for suite, (n, at) in spans.items()
        },
        "sweep": {"attack": "pgd40_ce", "radii": RADII, "accuracy": sweep, "low": [r["low"] for r in rates],
                  "high": [r["high"] for r in rates], "n": 1_000, "view": "adaptive"} if adaptive else None,
        "gate": {"verdict": verdict, "static": "unreliable" if static else "not run", "checks": [
            check("more steps do not hurt the attacker", True, "92.6 at 100 steps, 92.9 at 40", 0.31),
            check("an unbounded attack leaves under 1%", verdict == "ok", "0.0 left of 1,000"),
            check("no black box beats every white box", None, "no black-box attack in the suite"),
            *([check("static not far above adaptive", False, "static leaves 71.8 %", 0.0) | {"concerns": "static"}]
              if static else []),
        ]} if verdict != "not run" else {"verdict": "not run", "checks": []},
    }  # fmt: skip


def check(name: str, passed: bool | None, detail: str, p: float | None = None) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail, "p": p}


def evaluation(row: str, systems: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """`evaluate/ROW.json`."""
    card = {
        "dataset": "mnist", "network": {"name": "lenet5"}, "effective_epochs": 12.0, "seed": 0,
        "parameters": {"classifier": 61_706}, "recipe": {"epochs": 12, "optimizer": "sgd", "lr": 0.05},
        "data_checksum": "sha256:0b6dd8f5a1c94e6bb0de2d8b2d7f2c35", 
        "code": {"casemate.networks.small": "3d1c07aa51e9f204"},
    }  # fmt: skip
    found = {
        "schema": 1, "profile": "mnist", "row": row, "method": row, "dataset": "mnist", "network": "lenet5",
        "classes": [str(i) for i in range(10)], "budget": 1.0, "seed": 0, "card": card, "untrained": False,
        "threat": LINF, "systems": systems,
    }  # fmt: skip
    return found | changes


HOLDS = [0.957, 0.931, 0.929, 0.926, 0.944, 0.928, 0.981, 0.702]
FALLS = [0.412, 0.251, 0.243, 0.212, 0.301, 0.236, 0.655, 0.116]
SEEMS = [0.893, 0.752, 0.741, 0.722, 0.803, 0.744, 0.951, 0.611]


def rows() -> list[dict[str, Any]]:
    """standard; two trained defenses; ATLD in three modes; one row for each reason not to be ranked."""
    trades = [a + 0.003 for a in HOLDS]
    limited, flattered = [a - 0.02 for a in FALLS], [a + 0.01 for a in SEEMS]
    return [
        evaluation("standard", [system("standard", "plain", 0.9912, [0.081, 0, 0, 0, 0.001, 0, 0.002, 0])]),
        evaluation("at_pgd", [system("at_pgd", "plain", 0.9874, HOLDS)]),
        evaluation("trades", [system("trades", "plain", 0.9853, trades)]),
        evaluation("atld", [
            system("atld", "imt", 0.9789, FALLS, SEEMS),
            system("atld+limited", "limited", 0.9803, limited, flattered, verdict="not run"),
            system("atld+off", "off", 0.9811, [a + 0.03 for a in FALLS]),
        ]),
        evaluation("masked", [system("masked", "plain", 0.9841, SEEMS, verdict="unreliable")], method="at_pgd"),
        evaluation("half", [system("half", "plain", 0.9841, HOLDS, incomplete=["cw_margin"])], method="at_pgd"),
        evaluation("opaque", [system("opaque", "wall", 0.9841, None, SEEMS, verdict="not run")], method="atld"),
        evaluation("brief", [system("brief", "plain", 0.9441, HOLDS)], method="at_pgd", untrained=True),
    ]  # fmt: skip


def write_profile(root: Path, found: list[dict[str, Any]], profile: str = "mnist") -> ReportInputs:
    """Write the evaluations, with training metrics, curves, parity and, four times, images; load them."""
    reports, models = root / "reports" / profile, root / "models" / profile
    for at, one in enumerate(found):
        name = one["row"]
        dump(reports / "evaluate" / f"{name}.json", one | {"profile": profile})
        dump(reports / "train" / f"{name}.json", {"val_clean": 0.9881, "val_robust": 0.9432, "loss": 0.183})
        dump(reports / "export" / f"{name}.json", parity(name))
        dump(reports / "release" / f"{name}.json", release(0.9, passed=name != "standard"))
        write_curves(reports / "curves" / f"{name}.csv", at)
        if at < 4:
            write_images(models / "evaluated" / name / "adversarial.npz", purified=name == "atld", seed=at)
    return ReportInputs.load(profile, reports, models, [one["row"] for one in found])


def dump(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def parity(row: str) -> dict[str, Any]:
    numbers = [
        {"name": "score, largest difference", "value": 8.6e-7, "bound": 2e-5, "passed": True},
        {"name": "logits given the same purified image", "value": 7.6e-6, "bound": 8.8e-5, "passed": True},
        {"name": "prediction agreement", "value": 0.9998, "bound": 0.995, "passed": True},
    ]  # fmt: skip
    return {"row": row, "files": [{"file": f"{row}.onnx", "form": "plain", "passed": True, "numbers": numbers}]}


def release(left: float, *, passed: bool) -> dict[str, Any]:
    """`release/ROW.json` with one file, plain."""
    served = rate(left, 500) | {"attacks": ["stored", "square"]}
    return {"schema": 1, "row": "x", "margin": 0.02, "queries": 1000, "steps": 100, "seed": 0, "files": {"plain": {
        "sha256": "ab", "form": "plain", "variant": "float32", "passed": passed, "served": served,
        "table": rate(0.93, 500), "left": {"stored": 0.95, "square": left}, "failed": [] if passed else ["served"],
    }}}  # fmt: skip


def write_curves(path: Path, at: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["epoch", "loss", "val_clean", "val_robust", "lr"])
        for epoch in range(1, 13):
            gain = 1 - math.exp(-epoch / (2 + 0.5 * at))
            robust = "" if epoch == 1 else 0.9 * gain / (1 + 0.3 * at)
            writer.writerow([epoch, 2.2 * (1 - gain) + 0.15 + 0.05 * at, 0.7 + 0.28 * gain, robust, 0.05])


def write_images(path: Path, *, purified: bool, seed: int, channels: int = 1) -> None:
    """Twelve drawn digits and noisy copies within radius 0.3."""
    rng, font = np.random.default_rng(seed), ImageFont.load_default(size=22)
    labels = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 3, 8, 6])
    clean = np.zeros((len(labels), channels, 28, 28), np.float32)
    for at, label in enumerate(labels):
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((8, 1), str(label), fill=255, font=font)
        clean[at] = np.asarray(canvas, np.float32) / 255
    x_adv = np.clip(clean + 0.3 * np.sign(rng.standard_normal(clean.shape)), 0, 1).astype(np.float32)
    images = {"x_clean": clean, "x_adv": x_adv}
    if purified:
        images["x_purified"] = np.clip(x_adv - 0.15 * np.sign(x_adv - clean), 0, 1)
    fooled = np.where(rng.random(len(labels)) < 0.6, (labels + 3) % 10, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, indices=np.arange(len(labels)), labels=labels, prediction_clean=labels, prediction_adv=fooled, **images
    )


def test_a_profile_loads_in_the_order_asked_for(tmp_path: Path) -> None:
    inputs = write_profile(tmp_path, rows()[:3])
    assert [row.name for row in inputs.rows] == ["standard", "at_pgd", "trades"]
    row = inputs.rows[1]
    assert row.evaluation.systems[0].clean is not None and row.evaluation.systems[0].clean.accuracy == 0.9874
    assert row.curves["val_robust"][0] is None and row.curves["epoch"] == list(range(1, 13))
    assert row.parity is not None and row.parity.files[0].numbers[1].bound == 8.8e-5


def test_only_the_evaluation_is_needed(tmp_path: Path) -> None:
    dump(tmp_path / "r/evaluate/standard.json", rows()[0])
    row = ReportInputs.load("mnist", tmp_path / "r", tmp_path / "m").rows[0]
    assert (row.train, row.curves, row.parity, row.gallery) == ({}, {}, None, None)


def test_a_users_mistake_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the evaluate stage first"):
        ReportInputs.load("mnist", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"evaluate/trades.json does not exist"):
        ReportInputs.load("mnist", tmp_path, tmp_path, ["trades"])
    dump(tmp_path / "evaluate/trades.json", {"schema": 1, "profile": "mnist"})
    with pytest.raises(UserError, match=r"evaluate/trades.json: row: Field required") as told:
        ReportInputs.load("mnist", tmp_path, tmp_path)
    assert "\n" not in str(told.value)
    dump(tmp_path / "evaluate/trades.json", rows()[2] | {"schema": 2})
    with pytest.raises(UserError, match="schema 2, not 1"):
        ReportInputs.load("mnist", tmp_path, tmp_path)


def test_a_curve_that_is_no_number_is_named(tmp_path: Path) -> None:
    write_profile(tmp_path, rows()[:1])
    reports = tmp_path / "reports/mnist"
    (reports / "curves/standard.csv").write_text("epoch,loss\n1,0.5\n2,high\n")
    with pytest.raises(UserError, match=r"standard.csv, line 3, loss: 'high' is not a number"):
        ReportInputs.load("mnist", reports, tmp_path)
