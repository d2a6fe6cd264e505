"""AutoAttack of casemate against its authors' code and torchattacks: time, accuracy left, and memory.

    pip install --no-deps --target build/libraries torchattacks
    PYTHONPATH=build/libraries python benchmarks/autoattack.py --model models/mnist/trained/at_pgd --data mnist

On the same weights and images, 100 steps and 5,000 queries everywhere: the stage of APGD on cross-entropy alone, and
the whole of version "standard", each also with `search: bf16`. casemate attacks a network of its own, the libraries
the same weights in torch's layers. CPU time of one thread; every variant once a round, in a new order; a ratio is the
median over rounds of their time over ours in the same round. `--radius` decides how many images fall: where half of
them do, an exit inside a run shows. `--memory` evaluates growing numbers of images into a ledger, each in a fresh
process, and reports the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.agreement import Target, trained_target  # noqa: E402
from benchmarks.agreement_cases import CE, FAB, SQUARE, T  # noqa: E402
from benchmarks.agreement_libraries import authors, authors_standard, plain, torchattacks  # noqa: E402
from casemate.attacks.apgd import APGD  # noqa: E402
from casemate.attacks.autoattack import AutoAttack  # noqa: E402
from casemate.attacks.reduced import ReducedSearch  # noqa: E402
from casemate.threat import ThreatModel, untargeted  # noqa: E402
from casemate.training.precision import has_bf16  # noqa: E402

KEEP = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
OURS = {"apgd_ce": APGD(), "standard": AutoAttack()}
PEERS = {
    "apgd_ce": {"pyautoattack": authors("apgd-ce"), "torchattacks": torchattacks(CE)},
    "standard": {"pyautoattack": authors_standard, "torchattacks": torchattacks(CE, T, FAB, SQUARE)},
}
GOALS = {"apgd_ce": 1.5, "standard": 1.05}
GOAL_BF16 = 1.5
BF16 = "casemate, search: bf16"
Run = Callable[[], Tensor]


def variants(stage: str, target: Target, threat: ThreatModel) -> dict[str, Run]:
    """Each gives the images it made."""
    x, y, system = target.x, target.y, target.system
    ours = OURS[stage]
    made: dict[str, Run] = {"casemate": lambda: ours(system, x, untargeted(y), threat).x_adv}
    if has_bf16(torch.device("cpu")):
        half = ReducedSearch(ours)
        made[BF16] = lambda: half(system, x, untargeted(y), threat).x_adv
    for library, peer in PEERS[stage].items():
        try:
            run = peer(plain(target.system.classifier), threat, 0)
        except ImportError as error:
            print(f"{library} is left out: {error}", file=sys.stderr)
            continue
        made[library] = lambda run=run: run(x, y)  # type: ignore[misc]
    return made


def measure(stage: str, target: Target, threat: ThreatModel, rounds: int) -> list[dict[str, Any]]:
    made = variants(stage, target, threat)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    left: dict[str, float] = {}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(made), len(made)):
            begun = time.thread_time()
            images = made[name]()
            seconds[name].append(time.thread_time() - begun)
            with torch.no_grad():
                left[name] = float((target.system.decide(images) == target.y).float().mean())
    with torch.no_grad():
        clean = float((target.system.decide(target.x) == target.y).float().mean())
    rows = []
    for name, spent in seconds.items():
        row = {"stage": stage, "variant": name, "images": len(target.x), "clean": clean, "left": left[name]}
        row |= {"seconds": round(statistics.median(spent), 2), "ratio": ratio(spent, seconds["casemate"])}
        if BF16 in seconds:
            row["ratio_bf16"] = ratio(spent, seconds[BF16])
        rows.append(row)
    return rows


def ratio(spent: list[float], ours: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(spent, ours, strict=True)), 3)


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(images: int, model: str, data: str, root: Path) -> None:
    """Evaluate that many images into a ledger of a fresh folder; prints the peak of this process, in MB."""
    from casemate.attacks.gradient import PGD
    from casemate.data import load_dataset
    from casemate.evaluation.images import EvaluationSet
    from casemate.evaluation.ledger import Ledger
    from casemate.training.artifact import load_system

    system = load_system(Path(model))
    found = EvaluationSet(load_dataset(data, root).test, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        Ledger(Path(folder), 500).run(
            system, found, PGD(steps=5), ThreatModel("linf", 0.1), "adaptive", range(images)
        )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    for images in (500, 2000, 5000, 10000):
        command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--peak", str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"images": images, "peak_mb": round(float(done.stdout.split()[-1]), 1)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a trained row")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", type=Path, default=Path("data/raw"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--memory", action="store_true", help="the peak of evaluations of growing size instead")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not KEEP.items() <= os.environ.items():  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.peak:
        peak_of(options.peak, options.model, options.data, options.data_root)
        return
    about = {
        "time": "CPU time of one thread", "rounds": options.rounds, "model": options.model, "radius": options.radius,
        "machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }  # fmt: skip
    if options.memory:
        result: dict[str, Any] = {"conditions": about, "memory": memory(options)}
    else:
        radii = {"linf": options.radius, "l2": 2.0}
        target = trained_target(options.model, options.data, options.data_root, options.images, radii)
        threat = ThreatModel("linf", options.radius)
        rows = []
        for stage in options.stages:
            for row in measure(stage, target, threat, options.rounds):
                goal = f"(goal {GOALS[stage]}; bf16 {GOAL_BF16})" if "casemate" not in row["variant"] else ""
                print(row, goal, flush=True)
                rows.append(row)
        result = {"conditions": about, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
