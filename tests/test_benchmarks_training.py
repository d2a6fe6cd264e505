"""The benchmarks of training: that they measure what they say, on problems of no size."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steps, time_to_robustness, training_steps
from benchmarks.time_to_robustness import RECIPES, summary
from casemate import registry

SMALL = steps.Problem("digits_cnn", (1, 8, 8))


def test_a_case_is_of_a_registered_defense() -> None:
    assert set(training_steps.CASES) <= set(registry.names("defense"))


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("fgsm_rs", {"alarm": "off"}, 5), ("free", {"alarm": "off", "replays": 2}, 3), ("at_pgd", {"steps": 2}, 7),
        ("trades", {"steps": 2}, 11), ("mart", {"steps": 2}, 10), ("alp", {"steps": 2}, 10),
    ],
)  # fmt: skip
def test_a_step_executes_the_operations_that_its_passes_need_and_no_more(
    name: str, options: dict[str, Any], passes: float
) -> None:
    """In units of a forward pass: 1 forward, 1 an input gradient, 2 a weight gradient. A first layer's weight
    gradient needs no gradient of the image, which makes up the difference."""
    forward = steps.forward_flops(SMALL)
    executed = steps.step_flops(registry.resolve("defense", name)(**options), SMALL) / forward
    assert executed <= passes * 1.001
    assert executed > passes - 0.2


def test_the_flops_of_a_convolution_are_counted_both_ways() -> None:
    conv, x = torch.nn.Conv2d(2, 4, 3, bias=False), torch.rand(1, 2, 5, 5, requires_grad=True)
    with steps.Flops() as counter:
        conv(x).sum().backward()
    assert counter.total == 3 * 2 * (4 * 3 * 3) * (2 * 9)


def test_every_step_of_the_loop_is_timed() -> None:
    begun = time.thread_time()
    spent = steps.step_seconds(registry.resolve("defense", "standard")(), SMALL, training_steps.recipe(8), 5)
    assert len(spent) == 5 and all(s > 0 for s in spent) and sum(spent) < time.thread_time() - begun
    assert steps.rate(registry.resolve("defense", "standard")(), SMALL, training_steps.recipe(8), 2, 3, "cpu") > 0


def test_the_usual_step_learns_the_same_thing() -> None:
    """It is slower, not another method: from the same weights both lower the loss on adversarial images."""
    net, data = SMALL.fresh(), SMALL.data(16, "cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = [steps.plain_pgd_step(net, optimizer, data.x(torch.arange(16)), data.labels, 3, 0.01) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_record_times_trains_scores_and_goes_on(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(
        RECIPES["mnist_86"], dataset="digits", network="digits_cnn", radius=0.05, images=150, target=0.2,
        options={"steps": 1}, recipe={**RECIPES["mnist_86"].recipe, "epochs": 4, "precision": "fp32"},
    )  # fmt: skip
    monkeypatch.setitem(RECIPES, "mnist_86", made)
    monkeypatch.setenv("RECORD_STARTED", str(time.time() - 100))
    quick = {"steps": 2, "targets": 2, "queries": 5}
    plain = time_to_robustness.autoattack
    cut = [1]

    def scored(*given: Any, **options: Any) -> dict[str, Any]:
        """Stops after a chunk the first time, as a process that is killed."""
        keep = options["keep"]

        def kept(chunks: list[list[int]]) -> None:
            keep(chunks)
            if cut and cut.pop():
                raise KeyboardInterrupt

        return plain(*given, **{**options, **quick, "keep": kept})

    monkeypatch.setattr(time_to_robustness, "autoattack", scored)
    out = tmp_path / "parts" / "mnist_86-0.json"
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        time_to_robustness.attempt("mnist_86", 0, raw, out, threads, None, True)
    first = json.loads(out.read_text())
    assert first["cold"]["wall_s"] > 100 > first["training"]["wall_s"] > 0 and first["warm"]["same_bits"]
    time_to_robustness.attempt("mnist_86", 0, raw, out, threads, None, True)
    found = json.loads(out.read_text())
    assert found["score"]["complete"] and found["score"]["n"] == 150
    assert found["score"]["chunks"][0] == first["score"]["chunks"][0] and found["cold"] == first["cold"]
    assert not list(out.parent.glob("*.safetensors"))
    assert summary("mnist_86", [found] * 3)["reached"] == (found["score"]["autoattack"] >= 0.2)
    assert not summary("mnist_86", [found] * 2)["reached"], "two seeds are no record"


def test_the_slowest_time_and_the_lowest_accuracy_count() -> None:
    seeds = [
        {"cold": {"wall_s": w, "cpu_s": c}, "score": {"complete": True, "autoattack": a}}
        for w, c, a in ((10, 8, 0.9), (9, 9, 0.87), (12, 7, 0.88))
    ]
    made = summary("mnist_86", seeds)
    assert made["worst_times"]["cold"] == {"wall_s": 12, "cpu_s": 9} and made["lowest"] == 0.87 and made["reached"]
    seeds[1]["score"] = {"complete": True, "autoattack": 0.859}
    assert not summary("mnist_86", seeds)["reached"]
    seeds[1]["score"] = {"complete": False, "autoattack": 0.99}
    assert not summary("mnist_86", seeds)["reached"], "a seed that is not scored whole proves nothing"


def test_every_record_can_be_built() -> None:
    from casemate.training.recipe import Recipe

    for record in RECIPES.values():
        assert registry.resolve("defense", record.method)(**record.options)
        assert Recipe(**record.recipe).epochs > 0 and record.images == (1000 if record.dataset == "mnist" else 10_000)
