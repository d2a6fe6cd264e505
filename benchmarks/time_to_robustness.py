"""The shortest time to a robust accuracy: `python benchmarks/time_to_robustness.py --device cpu --data data/raw`.

On two CPU cores: to 86 % (aiming at 88 %) of full AutoAttack on the first 1,000 MNIST test images at linf 0.3. On one
GPU: to 43, 48, 49.5 and 50 % on CIFAR-10 at linf 8/255, no extra data, a ResNet-18 and standard AutoAttack on all
10,000 test images. A record is the time from nothing to weights, by wall clock: `cold` from the start of a fresh
process, imports, data and compiling included; `warm` the same training once more in that process. Scoring is outside
it, and the training never sees a test image. Three seeds; the slowest time and the lowest accuracy count. CPU time
stands beside wall time, which other jobs on a machine lengthen. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).parent / "results" / "time_to_robustness"
SEEDS = 3  # fewer make no record


@dataclass(frozen=True)
class Recipe:
    """One way to a robust accuracy. `target` and accuracies are fractions."""

    device: str
    target: float
    dataset: str
    network: str
    method: str
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]
    radius: float
    images: int
    normalise: bool = False
    aim: float | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)


SGD = {
    "optimizer": "sgd", "nesterov": True, "weight_decay": 5e-4, "augment": True, "batch_size": 128, "lr": 0.2,
    "schedule": "cyclic", "warmup": 0.2, "precision": "bf16", "cuda_graph": True, "fold_norms": True,
    "drop_last": True, "noise": "device", "validate_every": 0,
}  # fmt: skip


def _cifar(target: float, method: str, options: Mapping[str, Any], **recipe: Any) -> Recipe:
    return Recipe(
        "cuda", target, "cifar10", "resnet18", method, options, {**SGD, **recipe}, 8 / 255, 10_000, normalise=True
    )


RECIPES: dict[str, Recipe] = {
    "mnist_86": Recipe(
        "cpu", 0.86, "mnist", "fast_cnn", "at_pgd",
        {"steps": 1, "step_factor": 2.0, "ramp": 0.3, "plan": ((0.3, 2), (0.8, 4))},
        {"epochs": 4, "optimizer": "adam", "lr": 0.006, "batch_size": 128, "schedule": "trapezoid", "warmup": 0.1,
         "hold": 0.5, "precision": "bf16", "validate_every": 0},
        0.3, 1000, aim=0.88,
    ),
    "cifar10_43": _cifar(0.43, "n_fgsm", {"alarm": "off"}, epochs=15),
    "cifar10_48": _cifar(0.48, "at_pgd", {"steps": 3, "step_factor": 1.2}, epochs=30, ema=0.999),
    "cifar10_495": _cifar(0.495, "trades", {"steps": 7, "step_factor": 2.0}, epochs=40, ema=0.9995),
    "cifar10_50": _cifar(0.50, "at_pgd", {"steps": 7, "step_factor": 2.0}, epochs=60, ema=0.9995, awp=0.005,
                         awp_warmup=0.1),
}  # fmt: skip
"""By name. Those of CIFAR-10 are where the search begins; only a result in `results/` says what one reaches."""


def train_once(record: Recipe, seed: int, train_data: Any, device: str, epochs: float | None = None) -> Any:
    """(what `train` gives, seconds by wall, by CPU)."""
    import torch

    from casemate import registry
    from casemate.data.base import build_dataset
    from casemate.networks.base import Normalise, build_network
    from casemate.threat import ThreatModel
    from casemate.trainable import Task
    from casemate.training.loop import train
    from casemate.training.recipe import Recipe as Optimisation

    dataset = build_dataset(record.dataset)
    made = Optimisation(**{**record.recipe, **({} if epochs is None else {"epochs": epochs})})

    def fresh() -> Any:
        layer = Normalise(dataset.mean, dataset.std) if record.normalise else None
        return build_network(
            record.network, input_shape=dataset.input_shape, num_classes=len(dataset.classes), normalise=layer,
            **record.network_options,
        )  # fmt: skip

    threat = ThreatModel("linf", record.radius)
    task = Task(dataset.input_shape, len(dataset.classes), threat, fresh, made.player)
    method = registry.resolve("defense", record.method)(**record.options)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = train(
        method, task, train_data, None, made, seed=seed, device=device, pad=dataset.pad, flip=dataset.flip
    )  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    system = method.system(
        trained.modules, method.inference_modes[0], input_shape=dataset.input_shape,
        num_classes=len(dataset.classes), threat=threat,
    )  # fmt: skip
    return trained, system, time.perf_counter() - wall, time.process_time() - cpu


def autoattack(
    system: Any, test: Any, radius: float, images: int, *, chunk: int, done: list[list[int]],
    keep: Callable[[list[list[int]]], None], until: float = float("inf"), **parameters: Any,
) -> dict[str, Any]:  # fmt: skip
    """Full AutoAttack on the first `images` test images, a chunk at a time. `done` holds the chunks that are known:
    [images, right, robust]; `keep` is given them after each. Stops before one that would end after `until`.

    The search is in bf16 where the hardware has it, and judged in float32 (see `casemate.attacks.reduced`).
    """
    import torch

    from casemate.attacks.autoattack import AutoAttack
    from casemate.attacks.reduced import ReducedSearch
    from casemate.evaluation.robustness import wilson
    from casemate.seeding import derive
    from casemate.threat import ThreatModel, untargeted
    from casemate.training.memory import in_pieces
    from casemate.training.precision import exact, has_bf16

    attack: Any = AutoAttack(
        **{"diagnose": False, "check_every": 5 if test.device.type == "cuda" else 1, **parameters}
    )
    attack = ReducedSearch(attack) if has_bf16(test.device) else attack
    threat, spent = ThreatModel("linf", radius), 0.0
    for number in range(len(done), -(-images // chunk)):
        if time.monotonic() + spent > until:
            break
        begun = time.monotonic()
        rows = torch.arange(number * chunk, min((number + 1) * chunk, images), device=test.device)
        x, y = test.x(rows), test.labels[rows]
        with exact(test.device):
            right = system.decide(x) == y
            robust = right.clone()
            at = right.nonzero()[:, 0]
            if len(at):
                found = in_pieces(
                    lambda x=x, y=y, at=at, number=number: attack(  # type: ignore[misc]
                        system, x[at], untargeted(y[at]), threat, derive("score", number)
                    ),
                    system.classifier, len(at), print,
                )  # fmt: skip
                robust[at] = ~found.success
        done.append([len(rows), int(right.sum()), int(robust.sum())])
        keep(done)
        spent = time.monotonic() - begun
    n, right_n, robust_n = (sum(part[i] for part in done) for i in range(3))
    if not n:
        return {"n": 0}
    low, high = wilson(robust_n, n)
    return {
        "n": n, "clean": right_n / n, "autoattack": robust_n / n, "low": low, "high": high, "complete": n == images,
        "chunks": done,
    }  # fmt: skip


def attempt(name: str, seed: int, data: Path, out: Path, threads: int, epochs: float | None, warm: bool) -> None:
    """One seed in this process: train from cold, once more warm, then score. Writes after every part."""
    import torch
    from safetensors.torch import load_file, save_file

    from casemate.data import load_dataset
    from casemate.data.device import DeviceData

    torch.set_num_threads(threads)
    record, began = RECIPES[name], float(os.environ["RECORD_STARTED"])
    found = json.loads(out.read_text()) if out.exists() else {}
    loaded = load_dataset(record.dataset, data)
    train_data = DeviceData(loaded.train, record.device, channels_last=True)
    test = DeviceData(loaded.test, record.device)
    weights = out.with_suffix(".safetensors")
    trained, system, wall, cpu = (None, None, 0.0, 0.0)
    if "cold" not in found or not weights.exists():
        trained, system, wall, cpu = train_once(record, seed, train_data, record.device, epochs)
        found = {
            "seed": seed, "cold": {"wall_s": round(time.time() - began, 2), "cpu_s": round(time.process_time(), 2)},
            "training": {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "precision": trained.precision},
            "load": [round(v, 2) for v in os.getloadavg()],
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in system.classifier.state_dict().items()}, weights)
        write(out, found)
        if warm:
            again, _, wall, cpu = train_once(record, seed, train_data, record.device, epochs)
            found["warm"] = {
                "wall_s": round(wall, 2),
                "cpu_s": round(cpu, 2),
                "same_bits": digest(again) == digest(trained),
            }
            write(out, found)
    else:
        _, system, _, _ = train_once(record, seed, train_data, record.device, 1e-9)
        system.classifier.load_state_dict(load_file(weights))
    begun = time.process_time()

    def keep(chunks: list[list[int]]) -> None:
        found["score"] = {"chunks": chunks}
        write(out, found)

    chunks = found.get("score", {}).get("chunks", [])
    found["score"] = autoattack(system, test, record.radius, record.images, chunk=100, done=chunks, keep=keep)
    found["score"]["cpu_s"] = round(time.process_time() - begun, 1)
    write(out, found)
    weights.unlink()


def digest(trained: Any) -> str:
    parts = [
        v.detach().cpu().contiguous().numpy().tobytes() for v in trained.modules["classifier"].state_dict().values()
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def summary(name: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The record that these seeds make: their slowest times and lowest accuracy."""
    record = RECIPES[name]
    whole = [s for s in seeds if s.get("score", {}).get("complete")]
    worst = {
        kind: {unit: max(s[kind][unit] for s in seeds) for unit in ("wall_s", "cpu_s")}
        for kind in ("cold", "warm", "training") if all(kind in s for s in seeds)
    }  # fmt: skip
    lowest = min((s["score"]["autoattack"] for s in whole), default=None)
    reached = lowest is not None and len(whole) == len(seeds) >= SEEDS and lowest >= record.target
    return {
        "record": name, "target": record.target, "aim": record.aim, "reached": reached, "lowest": lowest,
        "worst_times": worst, "seeds": seeds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("data/raw"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-warm", action="store_true", help="leave out the second training")
    parser.add_argument("--epochs", type=float, help="other than the recipe's: then nothing is a record")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only or [name for name, record in RECIPES.items() if record.device == options.device]
    if options.seed is not None:
        out = options.out / "parts" / f"{names[0]}-{options.seed}.json"
        attempt(names[0], options.seed, options.data, out, options.threads, options.epochs, not options.no_warm)
        return
    for name in names:
        for seed in range(options.seeds):
            part = options.out / "parts" / f"{name}-{seed}.json"
            if not (part.exists() and json.loads(part.read_text()).get("score", {}).get("complete")):
                command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)]
                command += [] if options.only == [name] else ["--only", name]
                given = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
                subprocess.run(command, check=True, env=os.environ | given | {"RECORD_STARTED": str(time.time())})
            report(name, options)


def report(name: str, options: argparse.Namespace) -> None:
    """Put together what there is."""
    from benchmarks.steps import conditions

    parts = sorted((options.out / "parts").glob(f"{name}-*.json"))
    made = summary(name, [json.loads(part.read_text()) for part in parts])
    record = RECIPES[name]
    made["how"] = {
        "dataset": record.dataset, "radius": record.radius, "images": record.images, "network": record.network,
        "method": record.method, "options": record.options, "recipe": {**record.recipe}, "epochs": options.epochs,
    }  # fmt: skip
    made["conditions"] = {**conditions(record.device), "threads": options.threads}
    write(options.out / f"{name}.json", made)
    print(f"{name}: lowest {made['lowest']} of {made['target']}, {json.dumps(made['worst_times'])}", flush=True)


if __name__ == "__main__":
    main()
