"""What the training loop costs beside a bare one: `python benchmarks/training_loop.py`.

Both train the same network on the same batches with the same optimizer; the bare one is what one would write by hand
in ten lines, without logs, checks, seeds per step or validation. Rounds of the two alternate in one process, and the
ratio is the median over the rounds' own ratios, so that a busy machine moves both. On the CPU the time is that of
one thread. The step is plain training: with an attack in it the share of the loop is smaller still.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.standard import Standard
from casemate.networks.base import build_network
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.loop import train
from casemate.training.recipe import Recipe

STEPS = 60
RESULTS = Path(__file__).parent / "results" / "training_loop.json"
CASES = [("lenet5", 128), ("lenet5", 32), ("digits_cnn", 32)]
"""Network and batch size. The last is the smallest there is: what remains is the loop itself."""


def network(name: str) -> nn.Module:
    return build_network(name, input_shape=shape(name), num_classes=10)


def shape(name: str) -> tuple[int, int, int]:
    return (1, 8, 8) if name == "digits_cnn" else (1, 28, 28)


def random_data(name: str, n: int, device: str) -> DeviceData:
    draw = np.random.default_rng(0)
    _, height, width = shape(name)
    images = draw.integers(0, 256, (n, height, width, 1), dtype=np.uint8)
    return DeviceData(Images(images, draw.integers(0, 10, n)), device)


def clock(device: str) -> float:
    """Seconds: CPU time of this process, or wall time after the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def bare(name: str, data: DeviceData, recipe: Recipe, device: str) -> float:
    """Seconds of a hand-written loop."""
    began = clock(device)
    net = network(name).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=0.9, fused=True)
    for step, (x, y, _) in enumerate(data.batches(recipe.batch_size, seed=0, epoch=0)):
        optimizer.param_groups[0]["lr"] = recipe.lr * recipe.factor(step / STEPS)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return clock(device) - began


def looped(name: str, data: DeviceData, recipe: Recipe, device: str) -> float:
    """Seconds of `train` on the same."""
    task = Task(shape(name), 10, ThreatModel("linf", 0.3), lambda: network(name), recipe.player)
    began = clock(device)
    train(Standard(), task, data, None, recipe, seed=0, device=device)
    return clock(device) - began


def measure(name: str, batch: int, rounds: int, device: str) -> dict[str, object]:
    recipe = Recipe(epochs=1, lr=0.05, batch_size=batch, schedule="trapezoid", warmup=0.1, precision="fp32")
    data = random_data(name, STEPS * batch, device)
    bare(name, data, recipe, device), looped(name, data, recipe, device)
    pairs = [(bare(name, data, recipe, device), looped(name, data, recipe, device)) for _ in range(rounds)]
    by_hand, whole = (statistics.median(times) / STEPS * 1e6 for times in zip(*pairs, strict=True))
    ratios = sorted(loop / hand for hand, loop in pairs)
    return {
        "network": name,
        "batch": batch,
        "bare_us_per_step": round(by_hand),
        "loop_us_per_step": round(whole),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, batch, options.rounds, options.device) for name, batch in CASES]
    print(f"{'network':<12}{'batch':>6}{'bare us':>10}{'loop us':>10}{'ratio':>8}  quartiles")
    for row in rows:
        print("{network:<12}{batch:>6}{bare_us_per_step:>10}{loop_us_per_step:>10}{ratio:>8}".format(**row), end="  ")
        print("{} - {}".format(*row["ratio_quartiles"]))  # type: ignore[misc]
    RESULTS.parent.mkdir(exist_ok=True)
    conditions = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
        "steps_per_round": STEPS,
        "rounds": options.rounds,
        "time": "wall" if options.device == "cuda" else "CPU time of the process",
    }
    RESULTS.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
