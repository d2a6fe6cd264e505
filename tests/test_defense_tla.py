"""TLA: the triplet by hand, who the negatives are, passes and statistics, variants, the shared dictionary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, moved, parameters, tracked
from torch import Tensor, nn
from training_toys import recipe, run, weights
from training_toys import same as equal

from casemate.defenses.crafting import crafting
from casemate.defenses.tla import TLA, unit
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.threat import ThreatModel


class Pool:
    """Training data to draw from: images like `batch`'s, four classes in turn; keeps what it gave."""

    def __init__(self, bench: Bench, n: int = 64) -> None:
        self.images, self.labels = batch(n)
        self.bench = bench
        self.given: list[tuple[Tensor, Tensor]] = []
        bench.ctx.draw = self

    def __call__(self, n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rng = self.bench.ctx.rng
        if labels is None:
            at = torch.randint(0, len(self.labels), (n,), generator=rng)
        else:
            at = torch.stack([(self.labels == label).nonzero()[:, 0][0] for label in labels])
        self.given.append((self.images[at], self.labels[at]))
        return self.given[-1]


def bench(threat: ThreatModel = LINF, **options: Any) -> tuple[Bench, Pool]:
    made = Bench(TLA(**{"dictionary": 3, **options}), threat=threat)
    return made, Pool(made)


# --- the triplet --------------------------------------------------------------------------------------------

A, P, N = (
    torch.tensor(rows) for rows in ([[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [-1.0, 0.0]], [[0.0, 2.0], [1, 1.0]])
)
HALF = 0.5**0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # cos: .96 and .8; -1 and 1 / sqrt 2. distances: .04 and .2; 0 and 1 - 1 / sqrt 2
        ({}, (max(0, 0.04 - 0.2 + 0.5) + max(0, 0 - (1 - HALF) + 0.5)) / 2),
        ({"abs_cos": False}, (0.34 + (2 - (1 - HALF) + 0.5)) / 2),
        ({"distance": "l2"}, (max(0, 2**0.5 - 13**0.5 + 0.5) + (2 - 1 + 0.5)) / 2),
    ],
)
def test_the_hinge_by_hand(options: Any, expected: float) -> None:
    made = TLA(norm_weight=0.0, **options)
    assert made.triplet(A, P, N, torch.ones(2), 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_symmetric_and_by_hand() -> None:
    made = TLA(distance="kl")
    p, q = A.softmax(1), N.softmax(1)
    expected = (p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)
    torch.testing.assert_close(made.apart(A, N), expected)
    torch.testing.assert_close(made.apart(N, A), expected)


def test_norms_are_means_over_entries_and_count_where_there_is_no_negative() -> None:
    made = TLA(norm_weight=0.1)
    norms = (26 + 26 + 6) / 4 * 0.1
    assert made.triplet(A, P, N, torch.zeros(2), 0.5).item() == pytest.approx(norms, rel=1e-5)


def test_a_triplet_that_is_far_enough_apart_costs_nothing() -> None:
    a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    made = TLA(norm_weight=0.0)
    assert made.triplet(a, a, n, torch.ones(1), 0.9).item() == 0
    assert made.triplet(a, a, n, torch.ones(1), 1.1).item() == pytest.approx(0.1)


def test_margins_follow_the_distance_unless_they_are_given() -> None:
    given = [
        TLA(), TLA(distance="l2"), TLA(distance="kl"), TLA(margin=0.02), TLA(margin=0.02, clean_margin=0.6)
    ]  # fmt: skip
    assert [(t._margin, t._clean_margin) for t in given] == [(0.03, 0.03), (1, 1), (5, 5), (0.02, 0.02), (0.02, 0.6)]


def test_a_zero_feature_has_a_finite_gradient() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    for distance in ("cosine", "l2", "kl"):
        (gradient,) = torch.autograd.grad(TLA(distance=distance).apart(zero, torch.zeros(1, 3)).sum(), zero)  # type: ignore[arg-type]
        assert bool(gradient.isfinite().all())
    assert torch.equal(unit(zero), torch.zeros(1, 3))


# --- negatives ----------------------------------------------------------------------------------------------


def test_negatives_are_the_nearest_of_another_class() -> None:
    made, pool = bench()
    x, y = batch()
    f = made.f
    with crafting(f):
        images, found = made.defense.negatives(made.ctx, f, x, y)  # type: ignore[attr-defined]
        h, (drawn, labels) = f.features(x), pool.given[0]
        assert len(drawn) == 24 and bool(found.all())
        for i in range(8):
            others = drawn[labels != y[i]]
            nearest = F.cosine_similarity(h[i : i + 1], f.features(others)).argmax()
            torch.testing.assert_close(images[i], others[nearest])


def test_a_dictionary_of_one_class_has_no_negative_for_it() -> None:
    made, pool = bench()
    x, y = batch()
    pool.labels = torch.full_like(pool.labels, 2)
    with crafting(made.f):
        _, found = made.defense.negatives(made.ctx, made.f, x, y)  # type: ignore[attr-defined]
    assert torch.equal(found.bool(), y != 2)


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sizes", "outer"),
    [
        ({}, [8, 8, 8, 24, 8, 8, 8, 8, 8], 4),
        ({"dictionary": 1}, [8, 8, 8, 8, 8, 8, 8, 8, 8], 4),
        ({"negative": "random"}, [8, 8, 8, 8, 8, 8, 8], 4),
        ({"use_clean": False}, [8, 8, 8, 24, 8, 8, 8, 8], 3),
        ({"use_clean": False, "feature_matching": 0.5}, [8, 8, 8, 24, 8, 8, 8, 8, 8], 4),
        ({"use_positive": False}, [8, 8, 8, 24, 8, 8, 8, 8], 3),
    ],
)
def test_passes_and_statistics(options: Any, sizes: list[int], outer: int) -> None:
    """Three of ascent; the dictionary, and the anchor among it; then x, x', negative and positive on their own."""
    made, _ = bench(steps=3, **options)
    x, y = batch()
    before = parameters(made.f)
    with Probe(made.f.body["conv"]) as passes:
        made.step(x, y)
    assert sum(passes.train) == outer
    assert sorted(len(seen) for seen in passes.inputs) == sorted(sizes)
    assert passes.train == [False] * (len(sizes) - outer) + [True] * outer
    assert passes.frozen == [True] * (len(sizes) - outer) + [False] * outer
    assert passes.backwards == 3 + outer
    assert tracked(made.f) == outer
    assert moved(before, made.f)


def terms(made: Bench, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Features and logits of a step, found again on a copy: of its four train-mode images in order of use."""
    f = copy.deepcopy(made.f).train()
    with Probe(made.f.body["conv"]) as passes:
        ((_, loss),) = made.step(x, y)
    images = [seen for seen, train in zip(passes.inputs, passes.train, strict=True) if train]
    return {
        "loss": torch.tensor(loss),
        "logits": f(images[0]),
        **{name: f.features(image) for name, image in zip(("adv", "n", "p", "x"), images, strict=True)},
        **{f"{name}_image": image for name, image in zip(("adv", "n", "p", "x"), images, strict=True)},
    }


def test_the_loss_by_hand() -> None:
    made, _ = bench(weight=0.7, margin=0.2, clean_margin=0.1, norm_weight=0.01, feature_matching=0.3, smoothing=0.1)
    x, y = batch()
    t = terms(made, x, y)

    def apart(u: Tensor, v: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(t[u], t[v]).abs()  # type: ignore[index]

    def norms(*names: str) -> Tensor:
        return sum((t[name] ** 2).mean() for name in names)  # type: ignore[return-value]

    one = (apart("adv", "x") - apart("adv", "n") + 0.1).clamp_min(0).mean() + 0.01 * norms("adv", "x", "n")  # type: ignore[arg-type]
    two = (apart("adv", "p") - apart("adv", "n") + 0.2).clamp_min(0).mean() + 0.01 * norms("adv", "p", "n")  # type: ignore[arg-type]
    targets = 0.9 * F.one_hot(y, 4) + 0.1 / 4
    entropy = -(targets * t["logits"].log_softmax(1)).sum(1).mean()
    matching = ((t["x"] - t["adv"]) ** 2).sum(1).mean()
    assert t["loss"].item() == pytest.approx((entropy + 0.7 * (one + two) + 0.3 * matching).item(), rel=1e-5)
    assert float(made.ctx.logs["triplets"]) == pytest.approx((one + two).item(), rel=1e-5)


def test_the_anchor_may_be_switched() -> None:
    made, _ = bench(switch_anchor=True, weight=1.0, norm_weight=0.0, margin=0.2)
    x, y = batch()
    f = copy.deepcopy(made.f).eval()
    t = terms(made, x, y)

    def apart(u: str, v: str) -> Tensor:
        return 1 - F.cosine_similarity(t[u], t[v]).abs()

    entropy = F.cross_entropy(t["logits"], y)
    hinges = sum((apart("x", q) - apart("x", "n") + 0.2).clamp_min(0).mean() for q in ("adv", "p"))
    assert t["loss"].item() == pytest.approx((entropy + hinges).item(), rel=1e-5)
    drawn, labels = made.ctx.draw.given[0]  # type: ignore[attr-defined]
    for i in range(8):  # and the negative is the one nearest to the clean image
        others = drawn[labels != y[i]]
        nearest = F.cosine_similarity(f.features(t["x_image"][i : i + 1]), f.features(others)).argmax()
        torch.testing.assert_close(t["n_image"][i], others[nearest])


def test_what_the_four_images_are() -> None:
    made, pool = bench()
    x, y = batch()
    t = terms(made, x, y)
    assert bool(LINF.contains(t["adv_image"], x).all())
    noise = t["x_image"] - x
    assert float(noise.abs().max()) <= LINF.radius + 0.5 / 255 + 1e-6 and float(noise.abs().mean()) > 0.03
    torch.testing.assert_close((t["x_image"] * 255).round(), t["x_image"] * 255, atol=1e-3, rtol=0)
    images, labels = pool.given[-1]
    assert torch.equal(t["p_image"], images) and torch.equal(labels, y)


def test_the_clean_image_may_be_left_as_it_is() -> None:
    made, _ = bench(clean_noise=False)
    x, y = batch()
    assert torch.equal(terms(made, x, y)["x_image"], x)


def test_random_negatives_are_a_batch_drawn_blindly() -> None:
    made, pool = bench(negative="random")
    x, y = batch()
    t = terms(made, x, y)
    assert torch.equal(t["n_image"], pool.given[0][0]) and len(pool.given) == 2


def test_without_any_triplet_it_is_refused() -> None:
    with pytest.raises(UserError, match="has no triplet: use at_pgd"):
        bench(use_clean=False, use_positive=False)


def test_no_weight_and_no_radius_is_standard_training_with_more_statistics() -> None:
    made, _ = bench(ThreatModel("linf", 0.0), weight=0.0, clean_noise=False)
    x, y = batch()
    expected = F.cross_entropy(copy.deepcopy(made.f).train()(x), y)
    assert made.step(x, y)[0][1] == pytest.approx(expected.item(), rel=1e-6)


def test_it_learns_one_batch() -> None:
    made = Bench(TLA(dictionary=1, steps=2), lr=0.02, optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.03))
    Pool(made)
    x, y = batch()
    losses = [made.step(x, y)[0][1] for _ in range(250)]
    assert losses[-1] < losses[0] / 3
    assert bool((made.f.train()(x).argmax(1) == y).all())


# --- one dictionary for several steps -----------------------------------------------------------------------


def test_a_shared_dictionary_is_drawn_every_so_many_steps() -> None:
    made, pool = bench(reuse_dictionary=3, use_positive=False)
    x, y = batch()
    for _ in range(7):
        made.step(x, y)
    assert len(pool.given) == 3
    made, pool = bench(use_positive=False)
    for _ in range(7):
        made.step(x, y)
    assert len(pool.given) == 7 and not made.ctx.state


def network() -> Classifier:
    layers = {
        "conv": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
    }
    return Classifier(input_shape=(1, 4, 4), num_classes=3, layers=layers, head=nn.Linear(64, 3))


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_resumed_run_has_the_same_dictionary(tmp_path: Path, reuse: int) -> None:
    class Died(Exception):
        pass

    def die(_: object) -> None:
        raise Died

    # four batches to the epoch: the dictionary in use at the end of the first was drawn in its last step
    method, made = TLA(steps=1, dictionary=2, reuse_dictionary=reuse), recipe(epochs=2, lr=0.02)
    straight = run(method, made, network=network)
    with pytest.raises(Died):
        run(method, made, network=network, checkpoints=tmp_path, save=die)
    slots = sorted(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(slots) == 2
    slots[-1].unlink()
    resumed = run(method, made, network=network, checkpoints=tmp_path)
    assert equal(weights(resumed), weights(straight))
