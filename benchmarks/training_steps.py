"""What a training step of every registered defense costs, beside standard training and beside theory.

    python benchmarks/training_steps.py [--rounds 3] [--only at_pgd trades] [--skip-large]

For each defense, one step of the real loop: its time over that of standard training on the same network in the same
round, and its executed FLOPs over those of standard training. Theory counts passes of the classifier alone: a forward
pass 1, an input gradient 1, a weight gradient 2, so standard training is 3. Then: a PGD-10 step against the same step
as it is usually written; its share of what a matrix product reaches on the machine; and images a second of the data
path against the usual one. CPU time of one thread; defenses are interleaved, and figures are medians.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.agreement_libraries import plain  # noqa: E402
from benchmarks.steps import (  # noqa: E402
    Problem,
    conditions,
    forward_flops,
    plain_pgd_step,
    product_rate,
    step_flops,
    step_seconds,
)
from casemate import registry  # noqa: E402
from casemate.training.precision import has_bf16  # noqa: E402
from casemate.training.recipe import Recipe  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "training_steps.json"
CIFAR = Problem("compact_resnet")
ENCODED = Problem("er_conv", (1, 28, 28))
BATCH, STEPS = 32, 2
QUIET = {"alarm": "off"}  # it is no part of a step

CASES: dict[str, tuple[Problem, dict[str, Any], float | None]] = {
    "standard": (CIFAR, {}, 3),
    "rse": (CIFAR, {}, 3),
    "free": (CIFAR, {"replays": 4, **QUIET}, 3),
    "fgsm_ut": (CIFAR, QUIET, 5),
    "fgsm_ll": (CIFAR, QUIET, 5),
    "fgsm_rs": (CIFAR, QUIET, 5),
    "n_fgsm": (CIFAR, QUIET, 5),
    "feature_scattering": (CIFAR, {}, 6),
    "bilateral": (CIFAR, {}, None),
    "atld": (CIFAR, {}, 8),
    "iwdd": (CIFAR, {"width": 8, "scales": 2, "critic_steps": 1, "generator_steps": 1}, 10),
    "iwdd_plus_pgd": (CIFAR, {"width": 8, "scales": 2, "critic_steps": 1, "generator_steps": 1}, None),
    "adt_exp_am": (CIFAR, {"width": 16}, 7),
    "adt_imp_am": (CIFAR, {"width": 16}, 7),
    "l2l": (CIFAR, {"steps": 2, "network": "slim", "width": 16}, 13),
    "l2l_star": (CIFAR, {"width": 8}, 15),
    "at_pgd": (CIFAR, {"steps": 10}, 23),
    "at_cw": (CIFAR, {"steps": 10}, 23),
    "alp": (CIFAR, {"steps": 10}, 26),
    "mart": (CIFAR, {"steps": 10}, 26),
    "trades": (CIFAR, {"steps": 10}, 27),
    "tla": (CIFAR, {"steps": 10, "dictionary": 1}, None),
    "lat": (CIFAR, {"steps": 10, "latent_steps": 5}, None),
    "adt_exp": (CIFAR, {"steps": 7, "samples": 5}, 73),
    "l2l_da": (CIFAR, {"width": 8, "steps": 10}, 87),
    "e_cla": (ENCODED, {}, 3),
    "vae_cla": (ENCODED, {}, 3),
    "er": (ENCODED, {"steps": 20}, 46),
    "er_trades": (ENCODED, {"steps": 20}, 47),
    "defense_gan": (ENCODED, {}, None),
}
"""(network, options, passes of the classifier in theory; None: no count is published)"""


def recipe(batch: int, **changes: Any) -> Recipe:
    return Recipe(**{"epochs": 1, "lr": 0.01, "batch_size": batch, "precision": "fp32", "momentum": 0.9, **changes})


def measured(name: str, batch: int = BATCH, steps: int = STEPS) -> float:
    """Median seconds of a step."""
    problem, options, _ = CASES[name]
    method = registry.resolve("defense", name)(**options)
    return statistics.median(step_seconds(method, problem, recipe(batch), steps + 1)[1:])


def defenses(names: list[str], rounds: int, batch: int = BATCH) -> list[dict[str, Any]]:
    """A row for each name."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    base: dict[str, list[float]] = {"compact_resnet": [], "er_conv": []}
    standard = registry.resolve("defense", "standard")()
    for number in range(rounds):
        for problem in (CIFAR, ENCODED):
            spent = step_seconds(standard, problem, recipe(batch), 5)[1:]
            base[problem.network].append(statistics.median(spent))
        for name in names:
            seconds[name].append(measured(name, batch))
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr, flush=True)
    plain = {problem.network: step_flops(standard, problem) for problem in (CIFAR, ENCODED)}
    rows = []
    for name in names:
        problem, options, theory = CASES[name]
        of = base[problem.network]
        executed = step_flops(registry.resolve("defense", name)(**options), problem) / plain[problem.network]
        ratio = statistics.median(s / b for s, b in zip(seconds[name], of, strict=True))
        rows.append({
            "defense": name, "network": problem.network, "options": options, "batch": batch,
            "ms": round(1000 * statistics.median(seconds[name]), 1), "time_ratio": round(ratio, 2),
            "flops_ratio": round(executed, 2), "theory": None if theory is None else round(theory / 3, 2),
        })  # fmt: skip
    return sorted(rows, key=lambda row: float(row["time_ratio"]))


def against_plain(rounds: int) -> list[dict[str, Any]]:
    """PGD-10 training steps of the loop over the same step as it is usually written."""
    rows = []
    method = registry.resolve("defense", "at_pgd")(steps=10)
    kinds = ["fp32", *(["bf16"] if has_bf16(torch.device("cpu")) else [])]
    for problem, batch in ((Problem("lenet5", (1, 28, 28)), 128), (CIFAR, 32)):
        data = problem.data(batch, "cpu")
        x, y = data.x(torch.arange(batch)).contiguous(), data.labels
        usual: list[float] = []
        ours: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            net = plain(problem.fresh())
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            for _ in range(2):
                begun = time.thread_time()
                plain_pgd_step(net, optimizer, x, y, 10, 2 / 255)
                last = time.thread_time() - begun
            usual.append(last)
            for kind in kinds:
                ours[kind].append(step_seconds(method, problem, recipe(batch, precision=kind), 2)[-1])
        for kind in kinds:
            ratios = [p / o for p, o in zip(usual, ours[kind], strict=True)]
            rows.append({
                "network": problem.network, "batch": batch, "precision": kind,
                "usual_ms": round(1000 * statistics.median(usual), 1),
                "loop_ms": round(1000 * statistics.median(ours[kind]), 1),
                "times_faster": round(statistics.median(ratios), 2),
                "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            })  # fmt: skip
    return rows


def share_of_ceiling(rounds: int, name: str = "preact_resnet18", batch: int = 32) -> dict[str, Any]:
    """The FLOP/s of a PGD-10 step over those of a matrix product of side 2048, in the CPU's fastest precision."""
    kind = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    problem, method = Problem(name), registry.resolve("defense", "at_pgd")(steps=10)
    work = 23 * forward_flops(problem) * batch
    shares, seconds, ceilings = [], [], []
    for _ in range(rounds):
        ceilings.append(product_rate(dtype, 2048, "cpu"))
        seconds.append(step_seconds(method, problem, recipe(batch, precision=kind), 2)[-1])
        shares.append(work / seconds[-1] / ceilings[-1])
    return {
        "network": name, "batch": batch, "precision": kind, "step_s": round(statistics.median(seconds), 2),
        "product_gflops": round(max(ceilings) / 1e9), "share": round(statistics.median(shares), 3),
        "spread": [round(min(shares), 3), round(max(shares), 3)],
    }  # fmt: skip


def data_path(rounds: int) -> dict[str, Any]:
    """Microseconds for one cropped, mirrored CIFAR-sized image: a resident uint8 array against PIL and a loader."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    n, batch = 2048, 128
    resident = CIFAR.data(n, "cpu")
    arrays = np.ascontiguousarray(resident.images.permute(0, 2, 3, 1).numpy())
    change = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )

    class Usual(Dataset[Any]):
        def __len__(self) -> int:
            return n

        def __getitem__(self, index: int) -> Any:
            return change(Image.fromarray(arrays[index])), 0

    ours, usual = [], []
    for epoch in range(rounds + 1):
        begun = time.thread_time()
        for _ in resident.batches(batch, seed=0, epoch=epoch, pad=4, flip=True):
            pass
        middle = time.thread_time()
        for _ in DataLoader(Usual(), batch, shuffle=True):
            pass
        ours.append((middle - begun) / n * 1e6)
        usual.append((time.thread_time() - middle) / n * 1e6)
    ratio = statistics.median(u / o for u, o in zip(usual[1:], ours[1:], strict=True))
    return {
        "us_per_image": round(statistics.median(ours[1:]), 1), "usual_us": round(statistics.median(usual[1:]), 1),
        "times_faster": round(ratio, 1),
    }  # fmt: skip


def beside(rounds: int, *, skip_large: bool) -> None:
    """Measure what is not about single defenses anew, with its own conditions, into the known results."""
    known = json.loads(RESULTS.read_text())
    known["against_plain"], known["data_path"] = against_plain(rounds + 2), data_path(rounds + 2)
    if not skip_large:
        known["share_of_ceiling"] = share_of_ceiling(rounds)
    known["conditions_beside"] = {**conditions(), "rounds": rounds + 2}
    for part in ("against_plain", "data_path", "share_of_ceiling"):
        print(part, json.dumps(known.get(part)))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--skip-large", action="store_true", help="leave out PreActResNet-18's share of the ceiling")
    parser.add_argument(
        "--again", action="store_true", help="measure the defenses of --only and put them among the rest"
    )
    parser.add_argument(
        "--beside", action="store_true", help="measure all but the defenses, and put it among the rest"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.beside:
        beside(options.rounds, skip_large=options.skip_large)
        return
    found: dict[str, Any] = {"conditions": {**conditions(), "rounds": options.rounds}}
    found["defenses"] = defenses(options.only, options.rounds)
    for row in found["defenses"]:
        print("{defense:<20}{ms:>9} ms  time x{time_ratio:<7} FLOPs x{flops_ratio:<7} theory x{theory}".format(**row))
    if options.again:
        known = json.loads(RESULTS.read_text())
        kept = [row for row in known["defenses"] if row["defense"] not in options.only]
        new = [{**row, "load": found["conditions"]["load"]} for row in found["defenses"]]
        known["defenses"] = sorted([*kept, *new], key=lambda row: float(row["time_ratio"]))
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        return
    found["against_plain"] = against_plain(options.rounds + 2)
    found["data_path"] = data_path(options.rounds + 2)
    if not options.skip_large:
        found["share_of_ceiling"] = share_of_ceiling(options.rounds)
    for part in ("against_plain", "data_path", "share_of_ceiling"):
        print(part, json.dumps(found.get(part)))
    if set(options.only) == set(CASES):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
