"""What the exact internal Wasserstein distance costs, against its estimates and against plain assignment.

    python benchmarks/iwd.py [--rounds 5]
    python benchmarks/iwd.py --attack [--threads 2]     # IWDA's pyramid at its quick setting, seconds a picture

CPU milliseconds of one thread for one pair of images, medians over interleaved rounds, from the images to the figure.
The images are the centres of the two photographs that come with scikit-learn. A near pair is one of them and itself
under sign noise of 8/255, a shifted one is moved by a sixteenth of its width and a pixel, a far pair is both. Every
estimate stands beside the exact value of the same pair.

The attack is timed on the same photographs at 128 pixels against an EfficientNet-Lite0 at random: what a classifier
says does not change what the attack costs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.datasets import load_sample_images
from torch import Tensor

from casemate.attacks.iwda import IWDA, QUICK
from casemate.iwd import Windows, measure
from casemate.iwd.sinkhorn import sinkhorn
from casemate.iwd.sliced import directions, sliced
from casemate.networks.base import build_network
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted

CASES: dict[str, tuple[int, Windows]] = {
    "32 px, 2x2 disjoint": (32, Windows(size=2, stride=2)),
    "32 px, 3x3 dense": (32, Windows(size=3)),
    "32 px, 7x7 dense": (32, Windows(size=7)),
    "32 px, 11x11 dense": (32, Windows(size=11)),
    "224 px, 16x16 disjoint": (224, Windows(size=16, stride=16)),
    "224 px at 25 px, 11x11": (224, Windows(size=11, scale=25)),
    "224 px, 11x11, 512 drawn": (224, Windows(size=11, count=512)),
    "224 px, 11x11, 1024 drawn": (224, Windows(size=11, count=1024)),
}
DIRECTIONS = 128
SINKHORN = 300
"""Patches up to which the entropic estimate runs at all: it takes seconds a pair beyond."""


def picture(side: int, number: int) -> Tensor:
    """1 x 3 x side x side in [0, 1]: the middle 427x427 pixels of a photograph, reduced."""
    photograph = torch.from_numpy(load_sample_images().images[number].copy()).permute(2, 0, 1)[None] / 255
    middle = photograph[..., 106:533].float()
    return torch.nn.functional.interpolate(middle, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def plain(x: Tensor, y: Tensor, windows: Windows) -> float:
    """The same value by cost matrix and assignment alone, without bounds, certificates or potentials."""
    u, v = (windows.patches(windows.prepare(image.double()))[0].numpy() for image in (x, y))
    cost = cdist(u, v, "cityblock")
    return float(cost[linear_sum_assignment(cost)].mean()) / u.shape[1]


def entropic(x: Tensor, y: Tensor, windows: Windows) -> dict[str, float]:
    """What Sinkhorn knows after 100 steps."""
    u, v = (windows.patches(windows.prepare(image.double()))[0].numpy() for image in (x, y))
    found = sinkhorn(torch.from_numpy(cdist(u, v, "cityblock"))[None], steps=100)
    return {"lower": found.lower.item() / u.shape[1], "upper": found.upper.item() / u.shape[1]}


def timed(work: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in work}
    results = {name: run() for name, run in work.items()}
    quick: dict[str, float] = {}
    for name, run in work.items():
        began = time.process_time()
        run()
        quick[name] = max(1e-6, time.process_time() - began)
    for _ in range(rounds):
        for name, run in work.items():
            times = max(1, min(50, int(0.02 / quick[name])))
            run()  # what ran before has emptied the caches
            began = time.process_time()
            for _ in range(times):
                run()
            taken[name].append(1000 * (time.process_time() - began) / times)
    return {name: round(statistics.median(t), 3) for name, t in taken.items()}, results


def one(side: int, windows: Windows, kind: str, rounds: int) -> dict[str, Any]:
    x = picture(side, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).sign()
    y = {
        "near": lambda: (x + 8 / 255 * noise).clamp(0, 1),
        "shifted": lambda: x.roll(side // 16 + 1, 3),
        "far": lambda: picture(side, 1),
    }[kind]()
    theta = directions(DIRECTIONS, 3, windows, torch.Generator().manual_seed(3))
    work = {
        "exact": lambda: measure(x, y, windows),
        "plain": lambda: plain(x, y, windows),
        "sliced": lambda: sliced(x, y, windows, theta),
    }
    if len(windows.places(*windows.prepare(x).shape[-2:])) <= SINKHORN:
        work["sinkhorn"] = lambda: entropic(x, y, windows)
    milliseconds, found = timed(work, rounds)
    exact = found["exact"]
    assert abs(exact.value[0] - found["plain"]) < 1e-12, "the exact distance is not exact"
    value = float(exact.value[0])
    return {
        "patches": exact.count,
        "dimension": exact.dimension,
        "cpu_ms": milliseconds,
        "plain_over_exact": round(milliseconds["plain"] / milliseconds["exact"], 2),
        "value": round(value, 6),
        "bounds_over_exact": {
            "marginal": round(float(exact.lower[0]) / value, 3),
            "identity": round(float(exact.upper[0]) / value, 3),
            **{f"sinkhorn_{side}": round(v / value, 3) for side, v in found.get("sinkhorn", {}).items()},
        },
        "sliced": {
            "value": round(found["sliced"].value.item(), 6),
            "standard_error": round(found["sliced"].error.item(), 6),
            "bound_over_exact": round(found["sliced"].bound.item() / value, 4),
        },
    }


def attacked(pictures: int, threads: int) -> dict[str, Any]:
    """One run of IWDA at `QUICK` on so many pictures, side by side."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build_network("efficientnet_lite", input_shape=(3, 128, 128), num_classes=1000).eval()
    system = TorchSystem(net, input_shape=(3, 128, 128), num_classes=1000)
    x = torch.cat([picture(128, at % 2).roll(16 * at, 3) for at in range(pictures)])
    labels, attack = system.decide(x), IWDA(**QUICK)
    load, wall, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    result = attack(system, x, untargeted(labels), ThreatModel("linf", 4 / 255))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert result.cost.backwards.tolist() == [2 * attack.steps] * pictures
    return {
        "pictures": pictures, "threads": threads, "load_at_start": round(load, 1),
        "sizes": [size[0] for size in attack.sizes(128, 128)], "options": QUICK,
        "cpu_seconds_per_picture": round(cpu / pictures, 1), "wall_seconds_per_picture": round(wall / pictures, 1),
    }  # fmt: skip


def record_attack(out: Path, threads: int, pictures: int) -> None:
    """Put the attack's figures beside the distances'."""
    content = json.loads(out.read_text()) if out.exists() else {}
    found = attacked(pictures, threads)
    print(found)
    content.setdefault("attack", {})[f"{pictures} pictures, {threads} threads"] = found
    out.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/iwd.json"))
    parser.add_argument("--attack", action="store_true", help="time the attack, not the distances")
    parser.add_argument("--threads", type=int, default=2, help="of the attack")
    parser.add_argument("--pictures", type=int, default=1, help="attacked side by side")
    options = parser.parse_args()
    if options.attack:
        record_attack(options.out, options.threads, options.pictures)
        return
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    conditions = {
        "python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__,
        "numpy": np.__version__, "cores": os.cpu_count(), "threads": 1, "load_at_start": os.getloadavg()[0],
        "rounds": options.rounds, "directions": DIRECTIONS,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.out.read_text()).get("attack") if options.out.exists() else None
    for name, (side, windows) in CASES.items():
        for kind in ("near", "shifted", "far"):
            row = rows.setdefault(name, {})[kind] = one(side, windows, kind, options.rounds)
            costs = "  ".join(f"{k} {v:9.2f}" for k, v in row["cpu_ms"].items())
            print(f"{name:26} {kind:7} N={row['patches']:5} ms: {costs}  IWD {row['value']:.4f}", flush=True)
        conditions["load_at_end"] = os.getloadavg()[0]
        content = {"conditions": conditions, "pairs": rows, **({"attack": kept} if kept else {})}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
