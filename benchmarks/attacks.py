"""PGD-10 of the evaluation engine against the shortest loop one can write, on LeNet-5.

    python benchmarks/attacks.py [--json FILE] [--rounds 31]

Seconds are CPU time of one thread, the variants in a new order every round; a ratio is the median over rounds of the
variant's time over the loop's in the same round. Random weights and a radius that changes no decision: all steps are
made for all images. The last line is what early exit saves on a network that falls at once. The allocator is told to
keep its memory: else page faults, which fall on one variant or another by chance, are up to 7 % of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from casemate.attacks.ascent import ascend
from casemate.attacks.gradient import PGD
from casemate.networks.base import build_network
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted

KEEP = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
STEPS, GOAL = 10, 1.05
UNMOVED, LARGE = ThreatModel("linf", 1e-4), ThreatModel("linf", 0.3)


def loop(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """The reference: frozen parameters, fixed bounds, in-place steps, one forward to verify."""
    size = 2.5 * radius / STEPS
    low, high = (x - radius).clamp_(0), (x + radius).clamp_(max=1)
    at = x.clone().add_(torch.rand(x.shape).mul_(2).sub_(1), alpha=radius)
    at = torch.minimum(torch.maximum(at, low, out=at), high, out=at)
    for _ in range(STEPS):
        at.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(at), y, reduction="sum"), at)
        at = at.detach().add_(gradient.sign_(), alpha=size)
        at = torch.minimum(torch.maximum(at, low, out=at), high, out=at)
    with torch.no_grad():
        model(at).argmax(1)
    return at


def variants(batch: int, channels_last: bool) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    model = build_network("lenet5", input_shape=(1, 28, 28), num_classes=10).eval().requires_grad_(False)
    x = torch.rand(batch, 1, 28, 28)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    y = model(x).argmax(1)
    victim = TorchSystem(model, input_shape=(1, 28, 28), num_classes=10)
    goal, full, best = untargeted(y), PGD(steps=STEPS, keep="last"), PGD(steps=STEPS)
    start = UNMOVED.random_start(x, torch.Generator())

    def bare() -> Tensor:
        return ascend(
            lambda at: cross_entropy(model(at), y, reduction="none"), x, start, UNMOVED, steps=STEPS, step_size=2.5e-5
        )

    return {
        "hand-written loop": lambda: loop(model, x, y, UNMOVED.radius),
        "PGD, last iterate": lambda: full(victim, x, goal, UNMOVED),
        "PGD, first success": lambda: best(victim, x, goal, UNMOVED),
        "ascend (training; no verification)": bare,
        "PGD, first success, all fall": lambda: best(victim, x, untargeted((y + 1) % 10), LARGE),
    }


def measure(batch: int, channels_last: bool, rounds: int) -> list[dict[str, Any]]:
    made = variants(batch, channels_last)
    for run in made.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(made), len(made)):
            begun = time.thread_time()
            made[name]()
            seconds[name].append(time.thread_time() - begun)
    base = seconds["hand-written loop"]
    return [
        {
            "variant": name, "batch": batch, "channels_last": channels_last, "seconds": statistics.median(spent),
            "ratio": statistics.median(a / b for a, b in zip(spent, base, strict=True)),
        }
        for name, spent in seconds.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    if not KEEP.items() <= os.environ.items():  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    rows = [row for batch in (128, 512) for last in (True, False) for row in measure(batch, last, options.rounds)]
    print(f"{'variant':36} {'batch':>5} {'layout':>13} {'seconds':>8} {'ratio':>6}")
    for row in rows:
        layout = "channels_last" if row["channels_last"] else "contiguous"
        print(f"{row['variant']:36} {row['batch']:5} {layout:>13} {row['seconds']:8.4f} {row['ratio']:6.3f}")
    worst = max(row["ratio"] for row in rows if row["variant"] in ("PGD, last iterate", "PGD, first success"))
    print(f"worst ratio of the engine {worst:.3f}; goal {GOAL}")
    if options.json:
        about = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
            "goal": GOAL,
            "worst": worst,
        }
        options.json.write_text(json.dumps({**about, "goal": GOAL, "worst": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
