"""What `on_gpu.py` finds out, most wanted first."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.steps import Problem, forward_flops, plain_pgd_step, product_rate, rate
from benchmarks.time_to_robustness import RECIPES, SEEDS, Recipe, autoattack, train_once
from casemate import registry
from casemate.training.recipe import Recipe as Optimisation

if TYPE_CHECKING:
    from benchmarks.on_gpu import Item, Slice

QUIET = {"alarm": "off"}
PGD10 = {"steps": 10, "step_size": 2 / 255}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "fp32", "channels_last": False},
    "bf16": {"precision": "bf16"},
    "bf16_graph": {"precision": "bf16", "cuda_graph": True, "noise": "device"},
    "bf16_graph_fold": {"precision": "bf16", "cuda_graph": True, "noise": "device", "fold_norms": True},
}
COMPILED = {"bf16_graph_compile": {"precision": "bf16", "cuda_graph": True, "noise": "device", "compile": True}}
DEFENSES: dict[str, tuple[dict[str, Any], float]] = {
    "standard": ({}, 3), "fgsm_rs": (QUIET, 5), "at_pgd": (PGD10, 23), "n_fgsm": (QUIET, 5),
    "trades": ({**PGD10, "beta": 6.0}, 27), "atld": ({}, 9), "feature_scattering": ({}, 7), "mart": (PGD10, 26),
    "free": ({**QUIET, "replays": 4}, 3), "bilateral": ({}, 6), "alp": (PGD10, 26), "adt_exp_am": ({"width": 32}, 12),
    "at_cw": ({"steps": 10}, 23), "l2l": ({"steps": 2, "network": "slim", "width": 16}, 16), "fgsm_ll": (QUIET, 5),
    "adt_imp_am": ({"width": 32}, 12), "l2l_star": ({"width": 8}, 20), "tla": ({"steps": 10, "dictionary": 1}, 30),
    "lat": ({"steps": 10, "latent_steps": 5}, 40), "adt_exp": ({"steps": 7, "samples": 5}, 75),
    "l2l_da": ({"width": 8, "steps": 10}, 120),
}  # fmt: skip
"""name: (options, passes of the classifier a step, other networks roughly included)"""
EPOCHS, SCORED, CHUNK = 15, 1000, 500
GUESS = 0.0006  # seconds of a forward pass of 128 images, until the card has said


def items(slice_: Slice) -> list[Item]:
    from benchmarks.on_gpu import Item

    main, tiny = network(slice_), slice_.tiny
    wide = Problem("wrn", options={"depth": 28, "width": 10})
    found = [
        Item("card", card, lambda _: 8), Item("parity", parity, lambda _: 25, ("card",)),
        Item("rate-main-at_pgd", partial(rates, problem=main, method="at_pgd"), lambda _: 45, ("card",)),
    ]  # fmt: skip
    found += trainings(["fgsm_rs", "at_pgd"])
    found += records(["cifar10_43"])
    if not tiny:
        found.append(Item("rate-wrn-at_pgd", partial(rates, problem=wide, method="at_pgd"), lambda _: 70, ("card",)))
        found.append(Item("rate-wrn-atld", partial(rates, problem=wide, method="atld"), lambda _: 40, ("card",)))
        found.append(
            Item(
                "rate-resnet18", partial(rates, problem=Problem("resnet18"), method="at_pgd"), lambda _: 45, ("card",)
            )
        )
    found += records(["cifar10_50", "cifar10_48"]) + trainings(["n_fgsm", "trades", "atld", "feature_scattering"])
    if not tiny:
        compiled = partial(rates, problem=main, method="at_pgd", variants=COMPILED)
        found.append(Item("rate-main-compiled", compiled, lambda _: 150, ("card",)))
    found += trainings([name for name in DEFENSES if f"train-{name}" not in {item.name for item in found}])
    found.append(Item("captured", captured, lambda _: 60, ("card",)))
    found += records(["cifar10_495"])
    for seed in range(1, SEEDS):  # a record is the slowest time and the lowest accuracy of all of them
        found += records(["cifar10_43", "cifar10_50", "cifar10_48", "cifar10_495"], seed)
    return found


def network(slice_: Slice) -> Problem:
    return Problem("wrn", options={"depth": 10, "width": 1}) if slice_.tiny else Problem("preact_resnet18")


# --- the card and the step ------------------------------------------------------------------------------------------


def card(slice_: Slice) -> dict[str, Any]:
    """Its own ceilings: matrix products, a copy counted both ways, and what launching a kernel costs."""
    device, side = slice_.device, 256 if slice_.tiny else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    rates_: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rates_[f"{name}_tflops"] = round(product_rate(dtype, side, device) / 1e12, 3)
    torch.backends.cuda.matmul.allow_tf32 = before
    block = torch.empty(2**20 if slice_.tiny else 2**30, dtype=torch.uint8, device=device)
    other, small = torch.empty_like(block), torch.zeros(1, device=device)
    copy = min(_timed(device, lambda: other.copy_(block)) for _ in range(5))
    launch = _timed(device, lambda: [small.add_(1) for _ in range(1000)]) / 1000
    return {**rates_, "copy_gb_s": round(2 * len(block) / copy / 1e9, 1), "launch_us": round(launch * 1e6, 2)}


def _timed(device: str, work: Any) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def optimisation(batch: int = 128, **changes: Any) -> Optimisation:
    return Optimisation(
        **{"epochs": 1, "lr": 0.05, "momentum": 0.9, "batch_size": batch, "drop_last": True, **changes}
    )


def parity(slice_: Slice) -> dict[str, Any]:
    """Short runs from one seed in every variant: how far the weights end from those of float32, and the losses."""
    problem, device = Problem("wrn", options={"depth": 10, "width": 1}), slice_.device
    method = registry.resolve("defense", "at_pgd")(steps=2)
    data = problem.data(64 if slice_.tiny else 5120, device)
    batch, results, ends = 8 if slice_.tiny else 128, {}, {}
    for name, changes in {**VARIANTS, "bf16_graph_host": {"precision": "bf16", "cuda_graph": True}}.items():
        from casemate.training.loop import train

        said = io.StringIO()
        made = optimisation(batch, **changes, validate_every=0)
        with contextlib.redirect_stderr(said):
            trained = train(method, problem.task(made), data, None, made, seed=0, device=device)
        ends[name] = torch.cat([p.detach().flatten().cpu() for p in trained.modules["classifier"].parameters()])
        apart = float((ends[name] - ends["float32"]).norm() / ends["float32"].norm())
        results[name] = {"loss": trained.curves[-1]["loss"], "apart": apart, "said": said.getvalue().strip()}
    return {"variants": results, "network": problem.network}


def captured(slice_: Slice) -> dict[str, Any]:
    """Which defenses become CUDA graphs with their defaults here, and why the others do not."""
    from casemate.training.loop import train

    problem, told = Problem("wrn", options={"depth": 10, "width": 1}), {}
    data = problem.data(64 if slice_.tiny else 1024, slice_.device)
    for name, (options, _) in DEFENSES.items():
        said, made = io.StringIO(), optimisation(8 if slice_.tiny else 64, cuda_graph=True, validate_every=0)
        method = registry.resolve("defense", name)(**options)
        try:
            with contextlib.redirect_stderr(said):
                train(method, problem.task(made), data, None, made, seed=0, device=slice_.device)
            told[name] = said.getvalue().strip() or "captured"
        except Exception as error:  # which one fails is what is asked
            told[name] = f"failed: {error}"[:200]
    return {"defenses": told}


def rates(
    slice_: Slice, problem: Problem, method: str, variants: dict[str, dict[str, Any]] = VARIANTS
) -> dict[str, Any]:  # fmt: skip
    """Steps per second of each variant at two batch sizes, and of the step as it is usually written."""
    options, passes = DEFENSES[method]
    made = registry.resolve("defense", method)(**(options if not slice_.tiny else {"steps": 1}))
    work, ceiling = forward_flops(problem), (slice_.result("card") or {}).get("bf16_tflops", 1.0)
    warm, steps, sizes = (5, 3, (8,)) if slice_.tiny else (8, 20, (128, 512))
    rows = []
    for batch in sizes:
        for name, changes in variants.items():
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    seconds = rate(made, problem, optimisation(batch, **changes), warm, steps, slice_.device)
            except Exception as error:  # such as a compiler that is not there: the other variants count
                rows.append({"variant": name, "batch": batch, "failed": str(error)[:200]})
                continue
            rows.append(
                {"variant": name, **_row(batch, seconds, passes, work, ceiling), "said": said.getvalue().strip()}
            )
    usual = None
    if method == "at_pgd" and variants is VARIANTS:
        usual = _row(sizes[0], _usual(slice_, problem, sizes[0]), passes, work, ceiling)
    return {
        "network": problem.network, "method": method, "options": options, "gflop_forward": round(work / 1e9, 4),
        "passes": passes, "rows": rows, "usual": usual,
    }  # fmt: skip


def _row(batch: int, seconds: float, passes: float, work: float, ceiling: float) -> dict[str, Any]:
    tflops = passes * work * batch / seconds / 1e12
    return {
        "batch": batch, "step_ms": round(1000 * seconds, 3), "images_s": round(batch / seconds),
        "epoch_s": round(50_000 / batch * seconds, 2), "tflops": round(tflops, 3),
        "share_of_bf16_product": round(tflops / ceiling, 4) if ceiling else None,
    }  # fmt: skip


def _usual(slice_: Slice, problem: Problem, batch: int) -> float:
    """Seconds of a PGD-10 step as it is usually written."""
    data = problem.data(batch, slice_.device)
    x, y = data.x(torch.arange(batch, device=slice_.device)).contiguous(), data.labels
    net = problem.fresh().to(slice_.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    steps = 1 if slice_.tiny else 10
    spent = [_timed(slice_.device, lambda: plain_pgd_step(net, optimizer, x, y, steps, 2 / 255)) for _ in range(8)]
    return statistics.median(spent[3:])


def pass_seconds(slice_: Slice) -> float:
    """Of a forward pass of 128 images in the fastest variant."""
    found = slice_.result("rate-main-at_pgd")
    rows = [row for row in (found or {}).get("rows", []) if "step_ms" in row]
    return min((r["step_ms"] / 1000 / 23 * 128 / r["batch"] for r in rows if r["batch"] <= 128), default=GUESS)


def fastest(slice_: Slice) -> dict[str, Any]:
    """The recipe's options that won at a batch of 128."""
    found = slice_.result("rate-main-at_pgd")
    rows = [row for row in (found or {}).get("rows", []) if "step_ms" in row and row["batch"] <= 128]
    best = min(rows, key=lambda row: float(row["step_ms"]), default={"variant": "bf16_graph_fold"})
    return VARIANTS[best["variant"]]


# --- trainings and their scores -------------------------------------------------------------------------------------


def trainings(names: list[str]) -> list[Item]:
    from benchmarks.on_gpu import Item

    found = []
    for name in names:
        record = replace(
            RECIPES["cifar10_43"], method=name, options=DEFENSES[name][0], network="preact_resnet18",
            recipe={**RECIPES["cifar10_43"].recipe, "epochs": EPOCHS, "ema": 0.999}, images=SCORED,
        )  # fmt: skip
        passes = DEFENSES[name][1]
        found.append(
            Item(
                f"train-{name}",
                partial(training, record=record, item=f"train-{name}"),
                partial(training_seconds, passes=passes, epochs=EPOCHS),
                ("card",),
                data=True,
            )
        )
        found.append(Item(f"score-{name}", partial(scoring, record=record, item=f"train-{name}"),
                          partial(scoring_seconds, images=SCORED), (f"train-{name}",), data=True))  # fmt: skip
    return found


def records(names: list[str], seed: int = 0) -> list[Item]:
    from benchmarks.on_gpu import Item

    found = []
    for name in names:
        record, named = RECIPES[name], name if seed == 0 else f"{name}-seed{seed}"
        passes = DEFENSES[record.method][1] if "steps" not in record.options else 2 * record.options["steps"] + 6
        seconds = partial(training_seconds, passes=passes, epochs=float(record.recipe["epochs"]))
        found.append(
            Item(
                f"record-{named}",
                partial(training, record=record, item=f"record-{named}", seed=seed),
                seconds,
                ("card",),
                data=True,
            )
        )
        found.append(
            Item(
                f"score-{named}",
                partial(scoring, record=record, item=f"record-{named}"),
                partial(scoring_seconds, images=record.images),
                (f"record-{named}",),
                data=True,
            )
        )
    return found


def training_seconds(slice_: Slice, passes: float, epochs: float) -> float:
    if slice_.tiny:
        return 1.0
    return 12 + 1.15 * epochs * 50_000 / 128 * passes * pass_seconds(slice_)


def scoring_seconds(slice_: Slice, images: int) -> float:
    """Enough for two chunks: scoring goes on where it was. Half of the work is in float32, several times as slow."""
    if slice_.tiny:
        return 1.0
    return 10 + 3 * min(images, 2 * CHUNK) * 5500 * pass_seconds(slice_) / 128


def tried(slice_: Slice, record: Recipe) -> Recipe:
    """The record's recipe as it is run here."""
    recipe = {**record.recipe, **fastest(slice_)}
    if not slice_.tiny:
        return replace(record, recipe=recipe)
    few = {"options": {}, "recipe": {**recipe, "epochs": 1, "batch_size": 20}, "images": 20}
    return replace(record, network="wrn", network_options={"depth": 10, "width": 1}, **few)


def training(slice_: Slice, record: Recipe, item: str, seed: int = 0) -> dict[str, Any]:
    """Train once, in a process that has run the card's items, so warm but for this network; keep the weights. Cold
    times are `time_to_robustness.py --device cuda`'s, where the whole data set is at hand."""
    train_data, _, whole = slice_.data()
    run, said = tried(slice_, record), io.StringIO()
    with contextlib.redirect_stderr(said):
        trained, system, wall, _ = train_once(run, seed, train_data, slice_.device)
    slice_.save_weights(item, system.classifier)
    return {
        "method": run.method, "options": dict(run.options), "recipe": dict(run.recipe), "network": run.network,
        "seed": seed,
        "training_s": round(wall, 2), "epoch_s": round(wall / max(trained.epochs, 1e-9), 3), "epochs": trained.epochs,
        "n_train": len(train_data), "whole_data": whole, "curves": trained.curves, "said": said.getvalue().strip(),
    }  # fmt: skip


def scoring(slice_: Slice, record: Recipe, item: str) -> dict[str, Any]:
    """Full AutoAttack on the classifier alone, chunk by chunk for as long as the slice lasts."""
    from casemate.networks.base import Normalise, build_network
    from casemate.system import TorchSystem

    _, test, whole = slice_.data()
    run, name = tried(slice_, record), item.replace("train-", "score-").replace("record-", "score-")
    from casemate.data.cifar10 import CIFAR10

    net = build_network(
        run.network, input_shape=CIFAR10.input_shape, num_classes=10, **run.network_options,
        normalise=Normalise(CIFAR10.mean, CIFAR10.std) if run.normalise else None,
    ).to(slice_.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # fmt: skip
    if not slice_.load_weights(item, net):
        raise FileNotFoundError(f"the weights of {item} did not come along: run {item} again, or bring its files")
    system = TorchSystem(net.eval(), input_shape=CIFAR10.input_shape, num_classes=10)
    images = min(run.images, len(test))
    small = {"steps": 2, "targets": 2, "queries": 5} if slice_.tiny else {}

    def keep(chunks: list[list[int]]) -> None:
        slice_.write(name, {"chunks": chunks, "complete": False})

    done = (slice_.result(name) or {}).get("chunks", [])
    chunk = 10 if slice_.tiny else CHUNK
    found = autoattack(
        system, test, run.radius, images, chunk=chunk, done=done, keep=keep, until=slice_.until, **small
    )
    if found.get("complete"):
        slice_.drop_weights(item)
    return {"attack": "autoattack standard" if not small else "rehearsal", "whole_data": whole, **found}
