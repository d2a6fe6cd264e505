"""What the exported purification costs in ONNX Runtime: f(IMT(x)) as one graph against the plain classifier.

    python benchmarks/onnx_latency.py [--rounds 25] [--networks lenet5 resnet20 wrn resnet18] [--threads 1]

Some of the networks only: the result goes to a file that names them.

CPU time of one thread (wall time says little on a shared machine), or, with more threads, wall time, for which the
machine must be idle; the graphs taking turns in every round; medians over the rounds, of times and of each round's
ratio to the plain graph. Untrained weights: they do not change the
work. "imt" has a critic of one linear layer, so it shows the cost of the gradient and the second pass; "imt+critic"
has ATLD's WRN-28-5 in its 1x1 form; "critic's products" is a graph of nothing but the matrix products of that critic,
forward and backward, the least that it can add; "plain (exporter's)" is what torch.onnx.export alone makes of it.
The critic's own time is the difference of "imt+critic" and "imt". "wrn" is WRN-16-4, "resnet18" has 32x32 images; of
both, whose passes take seconds, only the first three graphs are timed, in at most 5 rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from casemate.deploy.export import export_system
from casemate.deploy.metadata import About
from casemate.deploy.session import open_session
from casemate.networks.base import build_network
from casemate.networks.critics import build_critic
from casemate.purification.imt import IMT
from casemate.system import TorchSystem

SHAPES = {"lenet5": (1, 28, 28), "resnet20": (3, 32, 32), "wrn": (3, 32, 32), "resnet18": (3, 32, 32)}
OPTIONS = {"wrn": {"depth": 16, "width": 4}}
LARGE = ("wrn", "resnet18")
LARGE_ROUNDS = 5
BATCHES = (1, 32)
GOALS = {
    "lenet5": {"imt": 4.5, "imt+critic": 12.0}, "resnet20": {"imt": 3.7, "imt+critic": 4.1}, "wrn": {"imt": 3.3},
    "resnet18": {"imt": 3.7},
}  # fmt: skip
ROUND_SECONDS = 0.05
ABOUT = About("none", tuple("0123456789"), "linf", 8 / 255)


class LinearCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(10, 1)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(codes)[:, 0], codes


def graphs(network: str, folder: Path) -> dict[str, Path]:
    """Every graph of a network by name, written to `folder`."""
    torch.manual_seed(0)
    options = OPTIONS.get(network, {})
    classifier = build_network(network, input_shape=SHAPES[network], num_classes=10, **options).eval()
    critic = build_critic((10,), 10, latent="logits", form="conv1x1").eval()
    made = {name: folder / f"{network}{at}.onnx" for at, name in enumerate(("plain", "imt", "imt+critic"))}
    for name, module in (("plain", None), ("imt", LinearCritic()), ("imt+critic", critic)):
        imt = None if module is None else IMT(classifier, module, radius=8 / 255)  # type: ignore[arg-type]
        system = TorchSystem(classifier, input_shape=SHAPES[network], num_classes=10, purification=imt)
        export_system(system, made[name], ABOUT)
    if network in LARGE:
        return made
    made["critic's products"] = folder / "products.onnx"
    onnx.save(products(critic), made["critic's products"])
    made["plain (exporter's)"] = folder / f"{network}-exporter.onnx"
    torch.onnx.export(
        nn.Sequential(classifier).eval(), (torch.rand(2, *SHAPES[network]),), made["plain (exporter's)"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"], verbose=False,
    )  # fmt: skip
    return made


def products(critic: nn.Module) -> onnx.ModelProto:
    """Each matrix of the critic's trunk once forward and once backward, in the order of use, and nothing else."""
    weights = [m.weight.detach().numpy() for m in critic.trunk.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    nodes = [
        helper.make_node("Shape", ["image"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "one"], ["rows"], axis=0),
    ]
    stored = [numpy_helper.from_array(np.array([1]), "one")]
    latest: dict[int, str] = {}
    for width in sorted({size for weight in weights for size in weight.shape}):
        stored.append(numpy_helper.from_array(np.ones((1, width), np.float32), f"ones{width}"))
        nodes.append(helper.make_node("Expand", [f"ones{width}", "rows"], [f"x{width}"]))
        latest[width] = f"x{width}"
    for at, weight in enumerate(weights):
        stored.append(numpy_helper.from_array(weight, f"w{at}"))
        nodes.append(helper.make_node("Gemm", [latest[weight.shape[1]], f"w{at}"], [f"up{at}"], transB=1))
        latest[weight.shape[0]] = f"up{at}"
    for at, weight in reversed(list(enumerate(weights))):
        nodes.append(helper.make_node("MatMul", [latest[weight.shape[0]], f"w{at}"], [f"down{at}"]))
        latest[weight.shape[1]] = f"down{at}"
    read = {name for node in nodes for name in node.input}
    ends = [node.output[0] for node in nodes if node.output[0] not in read]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 1, 1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends]
    graph = helper.make_graph(nodes, "products", [image], outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def measure(sessions: dict[str, Any], batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds per run, one number per round."""
    rng, feeds, repeats = np.random.default_rng(0), {}, {}
    for name, session in sessions.items():
        feeds[name] = {"image": rng.random((batch, *session.get_inputs()[0].shape[1:]), np.float32)}
        session.run(None, feeds[name])
        began, count = clock(), 0
        while clock() - began < ROUND_SECONDS:
            session.run(None, feeds[name])
            count += 1
        repeats[name] = count
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            began = clock()
            for _ in range(repeats[name]):
                session.run(None, feeds[name])
            taken[name].append((clock() - began) / repeats[name] * 1e3)
    return taken


def rows(network: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per batch size and graph, printed as it is made."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        files = graphs(network, Path(folder))
        sessions = {name: open_session(path, "cpu", threads=threads) for name, path in files.items()}
        clock = time.thread_time if threads == 1 else time.perf_counter
        for batch in BATCHES:
            taken = measure(sessions, batch, min(rounds, LARGE_ROUNDS) if network in LARGE else rounds, clock)
            critic = statistics.median(b - a for a, b in zip(taken["imt"], taken["imt+critic"], strict=True))
            print(f"{network:9} batch {batch:2}  the critic alone    {critic:9.4f} ms")
            for name, times in taken.items():
                ratios = [t / plain for t, plain in zip(times, taken["plain"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row = {
                    "network": network, "batch": batch, "graph": name, "ms": round(statistics.median(times), 4),
                    "ratio": round(middle, 2), "ratio_quartiles": [round(low, 2), round(high, 2)],
                    "goal": GOALS[network].get(name), "bytes": files[name].stat().st_size, "rounds": len(times),
                    **({"critic_ms": round(critic, 4)} if name == "imt+critic" else {}),
                }  # fmt: skip
                goal = "" if row["goal"] is None else f"  goal {row['goal']:4.1f}"
                print(f"{network:9} batch {batch:2}  {name:19} {row['ms']:9.4f} ms {row['ratio']:7.2f} x{goal}")
                made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--networks", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    time_of = "CPU time of one thread" if options.threads == 1 else f"wall time of {options.threads} threads"
    conditions = {
        "time": f"{time_of}, median; ratios are medians of each round's", "rounds": options.rounds,
        "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "load_at_start": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    found = [row for network in options.networks for row in rows(network, options.rounds, options.threads)]
    suffix = "" if options.threads == 1 else f"_{options.threads}_threads"
    part = "" if options.networks == list(SHAPES) else "_" + "_".join(options.networks)
    out = Path(f"benchmarks/results/onnx_latency{part}{suffix}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"conditions": conditions, "rows": found}, indent=1) + "\n")
    temporary.replace(out)


if __name__ == "__main__":
    main()
