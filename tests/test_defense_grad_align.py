"""grad_align: the loss and its gradient by hand, who is left out of the mean, passes, statistics, options."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked
from tape import CPU
from torch import Tensor, nn
from training_toys import batch_norm_net, recipe, run, weights
from training_toys import same as equal

from benchmarks import steps
from casemate.defenses.fgsm_rs import FGSMRS
from casemate.defenses.fgsm_ut import FGSMUT
from casemate.defenses.grad_align import GradAlign, in_mode, misalignment, slope
from casemate.networks.base import Classifier, build_network
from casemate.networks.quick import usual
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.training import graphs


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) ** 2


def bowl() -> Classifier:
    """Logits (0, a p^2 + b q^2) of two pixels, a = 1 and b = -2: the gradient goes along (a p, b q)."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    return Classifier(input_shape=(1, 1, 2), num_classes=2, layers={"squares": Squares()}, head=head)


PAIR = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2)
LABELS = torch.tensor([0, 1])


def noisy(x: Tensor, threat: ThreatModel = LINF) -> Tensor:
    """x + u of the first step."""
    return threat.random_start(x, generator("step", 0))


# --- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_the_loss_and_the_update_by_hand(weight: float) -> None:
    """cos of (a p, b q) at both places; the first is a constant. Label 0 climbs along it, label 1 against it."""
    assert GradAlign().weight == 0.2
    bench = Bench(GradAlign(weight=weight), bowl)
    with Probe(bench.f) as passes:
        ((players, loss),) = bench.step(PAIR, LABELS)
    x_adv = torch.tensor([[0.6, 0.3], [0.2, 0.7]])
    torch.testing.assert_close(passes.inputs[2].flatten(1), x_adv)

    slopes = torch.tensor([1.0, -2.0], requires_grad=True)
    near, here = noisy(PAIR).flatten(1) * slopes, PAIR.flatten(1) * slopes.detach()
    cos = [(n @ h) / (n.norm() * h.norm()) for n, h in zip(near, here, strict=True)]
    z = (x_adv**2) @ slopes
    entropy = ((1 + z[0].exp()).log() + (1 + (-z[1]).exp()).log()) / 2
    total = entropy + weight * (1 - (cos[0] + cos[1]) / 2)
    assert players == ("classifier",) and loss == pytest.approx(total.item(), rel=1e-5)
    assert float(bench.ctx.logs["alignment"]) == pytest.approx(((cos[0] + cos[1]) / 2).item(), rel=1e-5)
    assert float(bench.ctx.logs["train_robust"]) == 0.0

    (expected,) = torch.autograd.grad(total, slopes)
    moved_by = torch.tensor([1.0, -2.0]) - bench.f.head.weight.detach()[1]
    torch.testing.assert_close(moved_by / bench.lr, expected, rtol=1e-3, atol=1e-5)


def test_images_without_a_gradient_are_left_out_of_the_mean() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]).view(4, 1, 1, 2)
    b = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.0, 0.0], [2.0, 2.0]]).view(4, 1, 1, 2).requires_grad_()
    found = misalignment(a, b)
    assert found.item() == pytest.approx((1 + (1 - 1 / math.sqrt(2))) / 2)
    (gradient,) = torch.autograd.grad(found, b)
    assert bool(gradient.isfinite().all())
    assert gradient.flatten(1).any(1).tolist() == [True, False, False, True]
    nothing = misalignment(torch.zeros(2, 3), torch.ones(2, 3, requires_grad=True))
    assert nothing.item() == 0


def test_a_direction_counts_however_short_it_is() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    for scale in (1.0, 1e-12, 1e-30):
        assert misalignment(scale * a, scale * b).item() == pytest.approx(1 - 24 / 25, rel=1e-5)


def test_a_black_image_of_squares_is_learnt_from_all_the_same() -> None:
    """Its gradient is zero where it is clean, so nothing is compared; the other image's is."""
    x = torch.stack([torch.zeros(1, 1, 2), PAIR[0]])
    bench, alone = Bench(GradAlign(weight=3.0, alarm="off"), bowl), Bench(GradAlign(alarm="off"), bowl)
    bench.step(x, LABELS)
    near, here = noisy(x)[1].flatten(), x[1].flatten()
    slopes = torch.tensor([1.0, -2.0])
    assert float(bench.ctx.logs["alignment"]) == pytest.approx(
        F.cosine_similarity(near * slopes, here * slopes, dim=0).item(), rel=1e-5
    )
    alone.step(x[:1], LABELS[:1])
    assert float(alone.ctx.logs["alignment"]) == 1.0
    assert all(bool(p.isfinite().all()) for b in (bench, alone) for p in b.f.parameters())


@pytest.mark.parametrize(("name", "shape"), [("lenet5", (1, 28, 28)), ("preact_resnet18", (3, 32, 32))])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_quick_layers_have_the_same_gradient_of_a_gradient(name: str, shape: Any, mode: Any) -> None:
    torch.manual_seed(0)
    quick = build_network(name, input_shape=shape, num_classes=10)
    plain = copy.deepcopy(quick)
    usual(plain)
    x, y = torch.rand(32 if shape[0] == 1 else 4, *shape), torch.arange(32 if shape[0] == 1 else 4) % 10
    found = []
    for network in (quick, plain):
        with in_mode(network, mode):
            here, near = slope(network, x, y), slope(network, noisy(x), y, create_graph=True)
            assert not here.requires_grad and near.requires_grad
        apart = misalignment(here, near)
        weights = [p for p in network.parameters() if p.dim() > 1]
        found.append([apart.detach(), *torch.autograd.grad(apart, weights)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- passes and statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "updates"), [("train_update", 3), ("train", 1), ("eval", 1)])
@pytest.mark.parametrize("init", ["zero", "uniform"])
def test_passes_and_running_statistics(mode: Any, updates: int, init: Any) -> None:
    assert GradAlign().bn_mode_attack == "train_update" and GradAlign().init == "zero"
    bench, (x, y) = Bench(GradAlign(bn_mode_attack=mode, init=init)), batch()
    before, more = parameters(bench.f), int(init == "uniform")
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * (1 + more) + [False, False]
    assert passes.train == [mode != "eval"] * (2 + more) + [True]
    # two input gradients (three), and the weight gradient goes through the passes at x + u and at x_adv
    assert passes.backwards == 2 + more + 2
    assert tracked(bench.f) == updates + (more if mode == "train_update" else 0)
    assert moved(before, bench.f) and list(bench.players) == ["classifier"]
    assert bench.f.training and all(p.requires_grad for p in bench.f.parameters())
    assert all(m.track_running_stats for m in bench.f.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("init", "passes"), [("zero", 11), ("uniform", 13)])
def test_a_step_executes_the_operations_that_its_passes_need_and_no_more(init: str, passes: int) -> None:
    """A forward pass is 1, an input gradient 1, a weight gradient 2, and the gradient of an input gradient 4: through
    the backward pass and then the forward pass that it is made of, for weights and activations alike."""
    problem = steps.Problem("digits_cnn", (1, 8, 8))
    method = GradAlign(alarm="off", init=init)  # type: ignore[arg-type]
    executed = steps.step_flops(method, problem) / steps.forward_flops(problem)
    assert passes - 0.2 < executed <= passes * 1.001


def test_both_gradients_are_of_one_function() -> None:
    """Without noise they are the same in any mode, although statistics of a batch and running ones differ."""
    for mode in ("eval", "train", "train_update"):
        bench = Bench(GradAlign(bn_mode_attack=mode), threat=ThreatModel("linf", 1e-7))  # type: ignore[arg-type]
        bench.step(*batch())
        assert float(bench.ctx.logs["alignment"]) > 0.999


def test_the_clean_gradient_is_that_of_the_images_and_the_noise_is_not_cut() -> None:
    x, y = batch()
    x[:, :, 0] = 1.0
    bench = Bench(GradAlign())
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert torch.equal(passes.inputs[0], x) and torch.equal(passes.inputs[1], noisy(x))
    assert float(passes.inputs[1].max()) > 1 and float(passes.inputs[2].max()) <= 1
    assert 0.9 * LINF.radius < float((passes.inputs[1] - x).abs().max()) <= LINF.radius + 1e-6


# --- options ------------------------------------------------------------------------------------------------


def test_the_step_and_its_start() -> None:
    x = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)

    def ends(**options: Any) -> Tensor:
        bench = Bench(GradAlign(**options), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
        with Probe(bench.f) as passes:
            bench.step(x, torch.tensor([0]))
        return passes.inputs[-1].flatten()

    torch.testing.assert_close(ends(), torch.tensor([0.4, 0.5]))  # 1.25 radii, cut to one
    torch.testing.assert_close(ends(step_factor=0.5), torch.tensor([0.45, 0.45]))
    start = noisy(x).clamp(0, 1).flatten()
    step = torch.tensor([-0.05, 0.05])
    low, high = x.flatten() - 0.1, x.flatten() + 0.1
    torch.testing.assert_close(ends(step_factor=0.5, init="uniform"), (start + step).clamp(low, high))


def test_from_a_uniform_start_it_trains_on_the_images_of_fgsm_rs() -> None:
    ended = []
    for defense in (GradAlign(init="uniform", bn_mode_attack="eval"), FGSMRS(bn_mode_attack="eval")):
        bench = Bench(defense)
        with Probe(bench.f) as passes:
            bench.step(*batch())
        ended.append(passes.inputs[-1])
    torch.testing.assert_close(*ended)


def test_without_weight_it_is_fgsm() -> None:
    trained = {}
    for name, defense in {
        "fgsm": FGSMUT(), "none": GradAlign(weight=0, bn_mode_attack="eval"), "some": GradAlign(bn_mode_attack="eval")
    }.items():  # fmt: skip
        bench = Bench(defense)
        for _ in range(3):
            bench.step(*batch())
        trained[name] = parameters(bench.f)
    assert same(trained["fgsm"], trained["none"]) and not same(trained["fgsm"], trained["some"])


def test_its_weight_brings_the_gradients_into_line() -> None:
    found = {}
    for weight in (0.0, 2.0):
        bench = Bench(GradAlign(weight=weight), optimizer=torch.optim.Adam, lr=0.01, threat=ThreatModel("linf", 0.3))
        for _ in range(60):
            bench.step(*batch(32))
        found[weight] = float(bench.ctx.logs["alignment"])
    assert found[2.0] > found[0.0] + 0.05


def test_the_radius_grows_over_the_ramp() -> None:
    x, y = batch(64)
    for fraction, share in [(0.25, 0.5), (0.5, 1.0), (0.9, 1.0)]:
        bench = Bench(GradAlign(ramp=0.5))
        with Probe(bench.f) as passes:
            bench.step(x, y, fraction)
        assert float((passes.inputs[2] - x).abs().max()) == pytest.approx(share * LINF.radius, abs=1e-6)
        assert float((passes.inputs[1] - x).abs().max()) == pytest.approx(share * LINF.radius, rel=0.02)


def test_l2_moves_along_the_gradient_and_draws_from_its_ball() -> None:
    threat = ThreatModel("l2", 0.25)
    bench = Bench(GradAlign(), lambda: linear_network([[3.0, 0.0], [0.0, 4.0]]), threat)
    x = torch.full((1, 1, 1, 2), 0.5)
    with Probe(bench.f) as passes:
        bench.step(x, torch.tensor([0]))
    torch.testing.assert_close(passes.inputs[-1].flatten(), torch.tensor([0.35, 0.7]))
    assert torch.equal(passes.inputs[1], noisy(x, threat))


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(GradAlign(), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.005)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0


def test_the_alarm_takes_part_in_no_update() -> None:
    trained = []
    for alarm in ("off", "warn"):
        bench = Bench(GradAlign(alarm=alarm))  # type: ignore[arg-type]
        bench.step(*batch())
        trained.append(parameters(bench.f))
        assert ("alarm/train" in bench.ctx.state) == (alarm == "warn")
    assert same(*trained)


def test_a_captured_run_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for a value, not even to see which images have a gradient."""
    replays = []

    class Counting(CPU):
        def capture(self, work: Any) -> Any:
            replay = super().capture(work)
            return lambda: (replays.append(1), replay())

    monkeypatch.setitem(graphs.BACKENDS, "cpu", Counting)
    made = [run(GradAlign(), recipe(epochs=4, cuda_graph=f), network=batch_norm_net) for f in (False, True)]
    assert len(replays) >= 6 and equal(weights(made[0]), weights(made[1]))
