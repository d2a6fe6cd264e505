"""PGD-10 of casemate against torchattacks, foolbox and ART, on the same weights, images, step size and start.

    pip install --no-deps --target build/libraries torchattacks foolbox eagerpy adversarial-robustness-toolbox
    PYTHONPATH=build/libraries python benchmarks/libraries.py [--rounds 9] [--networks lenet5 preact_resnet18]

CPU time of one thread in float32; every variant once a round in a new order, a ratio is the median over rounds of the
library's time over ours in the same round. Random weights and a radius that changes no decision: nobody stops early.
casemate runs as its pipeline does, on a network of its own: channels-last layout, quick input gradient of the first
layer. The libraries run as their examples do, on the same network of plain torch layers, contiguous, and once more on
ours. With `search: bf16` the confirmation in float32 is in the time; the finish is not: its 20 steps of APGD are the
same whatever was searched. A library that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.agreement_libraries import plain  # noqa: E402
from casemate.attacks.gradient import PGD  # noqa: E402
from casemate.attacks.reduced import ReducedSearch  # noqa: E402
from casemate.networks.base import build_network  # noqa: E402
from casemate.system import TorchSystem  # noqa: E402
from casemate.threat import ThreatModel, untargeted  # noqa: E402
from casemate.training.precision import has_bf16  # noqa: E402

KEEP = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
STEPS, RADIUS = 10, 1e-4
SETTINGS = {"lenet5": ((1, 28, 28), 512), "preact_resnet18": ((3, 32, 32), 64)}
GOALS = {
    "lenet5": {"torchattacks": 1.8, "foolbox": 2.2, "ART": 2.4},
    "preact_resnet18": {"torchattacks": 1.0, "foolbox": 1.6, "ART": 1.7},
}
GOALS_BF16 = {"preact_resnet18": {"torchattacks": 2.0, "foolbox": 3.2, "ART": 3.4}}
BF16 = "casemate, search: bf16"
PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "adversarial-robustness-toolbox"}
Run = Callable[[], Any]


def with_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    import torchattacks

    attack = torchattacks.PGD(model, eps=RADIUS, alpha=RADIUS / 4, steps=STEPS, random_start=True)
    return lambda: attack(x, y)


def with_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    import foolbox

    victim = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=RADIUS / 4, steps=STEPS, random_start=True)
    return lambda: attack(victim, x, y, epsilons=RADIUS)


def with_art(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    victim = PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    attack = ProjectedGradientDescentPyTorch(
        victim, eps=RADIUS, eps_step=RADIUS / 4, max_iter=STEPS, num_random_init=1, batch_size=len(x), verbose=False
    )
    images, labels = x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()]
    return lambda: attack.generate(images, labels)


LIBRARIES = {"torchattacks": with_torchattacks, "foolbox": with_foolbox, "ART": with_art}


def network(name: str, *, ours: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build_network(name, input_shape=SETTINGS[name][0], num_classes=10).eval()
    return model.to(memory_format=torch.channels_last) if ours else plain(model)


def variants(name: str) -> dict[str, Run]:
    """Ours first; each library on both networks."""
    shape, batch = SETTINGS[name]
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    fast = network(name, ours=True)
    with torch.no_grad():
        y = fast(x).argmax(1)
    victim, threat = TorchSystem(fast, input_shape=shape, num_classes=10), ThreatModel("linf", RADIUS)
    attack, laid = PGD(steps=STEPS, relative_step=0.25), x.to(memory_format=torch.channels_last)
    half = ReducedSearch(attack, finish=0)
    made: dict[str, Run] = {"casemate": lambda: attack(victim, laid, untargeted(y), threat)}
    if has_bf16(torch.device("cpu")):
        made[BF16] = lambda: half(victim, laid, untargeted(y), threat)
    for library, prepare in LIBRARIES.items():
        for where, images in (("", x), (", our network", laid)):
            try:
                made[library + where] = prepare(network(name, ours=bool(where)), images, y)
            except ImportError as error:
                print(f"{library} is left out: {error}", file=sys.stderr)
                break
    return made


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    made = variants(name)
    for run in made.values():
        run()
    seconds: dict[str, list[float]] = {variant: [] for variant in made}
    order = random.Random(0)
    for _ in range(rounds):
        for variant in order.sample(list(made), len(made)):
            begun = time.thread_time()
            made[variant]()
            seconds[variant].append(time.thread_time() - begun)
    rows = []
    for variant, spent in seconds.items():
        row = {"network": name, "batch": SETTINGS[name][1], "variant": variant}
        row |= {"seconds": round(statistics.median(spent), 4), **against(spent, seconds["casemate"])}
        row["goal"] = GOALS[name].get(variant)
        if BF16 in seconds:
            row |= {f"bf16_{key}": value for key, value in against(spent, seconds[BF16]).items()}
            row["bf16_goal"] = GOALS_BF16.get(name, {}).get(variant)
        rows.append(row)
    return rows


def against(spent: list[float], ours: list[float]) -> dict[str, Any]:
    """Median and quartiles over the rounds of their time over ours."""
    ratios = [a / b for a, b in zip(spent, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)[:3]
    return {"ratio": round(middle, 2), "ratio_quartiles": [round(low, 2), round(high, 2)]}


def shown(row: dict[str, Any], which: str) -> str:
    goal = row.get(which + "goal")
    return f"{row.get(which + 'ratio', '')}" + ("" if goal is None else f" ({goal})")


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not KEEP.items() <= os.environ.items():  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [row for name in options.networks for row in measure(name, options.rounds)]
    print(f"{'network':16} {'batch':>5}  {'variant':30} {'seconds':>8} {'ratio (goal)':>18} {'to bf16 (goal)':>18}")
    for row in rows:
        head = f"{row['network']:16} {row['batch']:5}  {row['variant']:30} {row['seconds']:8.3f}"
        print(f"{head} {shown(row, ''):>18} {shown(row, 'bf16_'):>18}")
    if options.json:
        about = {
            "time": "CPU time of one thread", "rounds": options.rounds, "machine": platform.machine(),
            "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "versions": versions(),
        }  # fmt: skip
        options.json.write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
