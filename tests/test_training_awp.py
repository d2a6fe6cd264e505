"""Adversarial weight perturbation: by hand on a linear network, cost, statistics, and that it composes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import registry_toys
import torch
import torch.nn.functional as F
from stepping import Probe, linear_network
from torch import Tensor, nn
from training_toys import Plain, batch_norm_net, data, linear, recipe, run, same, weights

from casemate import registry
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.base import Defense
from casemate.defenses.er import ER
from casemate.defenses.free import Free
from casemate.defenses.trades import TRADES
from casemate.errors import UserError
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Trainable, Update
from casemate.training.awp import WeightPerturbation

ONE_STEP = {"batch_size": 40}


def start_of(network: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """The network factory, and a dictionary that will hold the weights it began with."""
    kept: dict[str, Tensor] = {}

    def made() -> nn.Module:
        net = network()
        kept.update({k: v.clone() for k, v in net.state_dict().items()})
        return net

    return made, kept


def test_a_step_by_hand_with_momentum_free_sgd_and_weight_decay() -> None:
    """w - lr (grad at w + v + decay (w + v)), biases not perturbed: the decay is seen at w + v, as published."""
    network, begin = start_of(linear)
    trained = run(Plain(), recipe(awp=0.05, weight_decay=0.01, **ONE_STEP), network=network)
    samples = data()
    x, y = samples.x(torch.arange(40)).flatten(1).double(), samples.labels
    w, b = (begin[k].double().requires_grad_() for k in ("1.weight", "1.bias"))
    (u,) = torch.autograd.grad(F.cross_entropy(x @ w.T + b, y), w)
    v = 0.05 * w.detach().norm() / u.norm() * u
    moved = (w + v).detach().requires_grad_()
    loss = F.cross_entropy(x @ moved.T + b, y)
    dw, db = torch.autograd.grad(loss, (moved, b))
    loss = loss.detach()
    expected = {"1.weight": w - 0.1 * (dw + 0.01 * moved), "1.bias": b - 0.1 * (db + 0.01 * b)}
    for key, value in weights(trained).items():
        torch.testing.assert_close(value.double(), expected[key].detach(), rtol=0, atol=1e-6)
    assert trained.curves[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert float(loss) > float(F.cross_entropy(x @ w.T + b, y).detach()), "the moved weights are worse"


def test_each_layer_moves_by_its_own_norm_and_comes_back() -> None:
    torch.manual_seed(0)
    net = batch_norm_net()
    net[3].weight.data *= 100  # type: ignore[index, operator]
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3

    def loss() -> Tensor:
        return F.cross_entropy(net.eval()(x), y)

    awp, at_rest = WeightPerturbation({"net": net}, recipe(awp=0.1)), loss().item()
    with awp.around(loss, list(net.parameters()), 0.0):
        assert loss().item() > at_rest
        for key, p in net.named_parameters():
            share = float((p - before[key]).norm() / before[key].norm()) if p.dim() > 1 else 0.0
            assert share == pytest.approx(0.1, rel=1e-4) if p.dim() > 1 else torch.equal(p, before[key])
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[key], rtol=1e-5, atol=1e-6)


def test_weights_come_back_after_an_error_and_unreached_ones_never_move() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.weight.data.zero_()
    before, x = [p.detach().clone() for p in (a.weight, b.weight)], torch.ones(4, 3)
    awp = WeightPerturbation({"a": a, "b": b}, recipe(awp=0.1))
    with (
        pytest.raises(RuntimeError, match="inside"),
        awp.around(lambda: a(x).square().sum(), [a.weight, b.weight], 0.0),
    ):
        assert not torch.equal(a.weight, before[0]) and torch.equal(b.weight, before[1])
        raise RuntimeError("inside")
    torch.testing.assert_close(a.weight.detach(), before[0])
    with awp.around(lambda: 0.0 * a(x).sum(), [a.weight], 0.0):
        torch.testing.assert_close(a.weight.detach(), before[0])  # no slope, no move, and no nan


@pytest.mark.parametrize(("warmup", "extra"), [(0.0, 4), (0.5, 2), (1.0, 0)])
def test_it_costs_one_pass_more_each_way_once_the_warm_up_is_over(warmup: float, extra: int) -> None:
    probes: list[Probe] = []

    def network() -> nn.Module:
        net = linear()
        probes.append(Probe(net).__enter__())
        return net

    run(Plain(), recipe(awp=0.01, awp_warmup=warmup), network=network)
    assert (len(probes[0].inputs), probes[0].backwards) == (4 + extra, 4 + extra)


@pytest.mark.parametrize("statistics", ["moved", "own"])
def test_running_statistics_are_taken_once_and_where_the_recipe_says(statistics: Any) -> None:
    seen: list[Tensor] = []

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(out.detach().mean((0, 2, 3)))
            return out

    def network() -> nn.Module:
        return nn.Sequential(Conv(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))

    trained = run(Plain(), recipe(awp=0.5, awp_statistics=statistics, **ONE_STEP), network=network)
    own, moved = seen
    assert not torch.allclose(own, moved, atol=1e-3)
    found = weights(trained)
    torch.testing.assert_close(found["1.running_mean"], 0.1 * (moved if statistics == "moved" else own))
    assert found["1.num_batches_tracked"] == 1
    assert trained.modules["classifier"][1].track_running_stats  # type: ignore[index]


def test_only_the_module_of_the_first_player_is_perturbed() -> None:
    seen: list[Tensor] = []

    class Two(Trainable):
        def modules(self, task: Task) -> dict[str, nn.Module]:
            return {"first": linear(), "second": linear()}

        def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
            return {name: task.player(module.parameters()) for name, module in modules.items()}

        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            second = ctx.modules["second"]

            def loss() -> Tensor:
                seen.append(second[1].weight.detach().clone())  # type: ignore[index]
                return F.cross_entropy(second(x) + ctx.modules["first"](x), y)

            yield Update(("second",), loss)
            yield Update(("first", "second"), loss)

    run(Two(), recipe(awp=0.5, **ONE_STEP))
    alone, proxy, moved = seen
    assert not torch.equal(alone, proxy) and torch.equal(proxy, moved), "one evaluation, then two of one step"


def test_zero_is_off_and_gamma_counts() -> None:
    plain = weights(run(Plain(), recipe()))
    assert same(plain, weights(run(Plain(), recipe(awp=0.0, awp_warmup=0.2))))
    one, other = (weights(run(Plain(), recipe(awp=gamma))) for gamma in (0.01, 0.02))
    assert not same(plain, one) and not same(one, other)


LEARNERS = [name for name in registry.names("defense") if name != "given"]  # which makes no step


@pytest.mark.parametrize("name", LEARNERS)
def test_it_composes_with_any_method(name: str) -> None:
    method, made = registry_toys.toy(name), {"batch_size": 8, "momentum": 0.9}
    plain, perturbed = (registry_toys.run(method, recipe(awp=gamma, **made)) for gamma in (0.0, 0.05))
    assert not same(weights(plain), weights(perturbed))
    assert all(tensor.isfinite().all() for tensor in weights(perturbed).values())


@pytest.mark.parametrize("name", ["e_cla", "er", "er_trades"])
def test_a_head_with_a_player_of_its_own_is_perturbed_with_its_encoder(name: str) -> None:
    """Seen where the losses pass through it: at w, then at w + v with |v| = gamma |w| in every layer."""
    seen: dict[str, list[Tensor]] = {"conv": [], "head": []}

    def network() -> nn.Module:
        net = registry_toys.network()
        parts = {"conv": net.body, "head": net.head}
        for key, part in parts.items():
            layer = next(m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear))

            def see(layer: Any, *_: Any, key: str = key) -> None:
                if layer.training and layer.weight.requires_grad:
                    seen[key].append(layer.weight.detach().clone())

            layer.register_forward_hook(see)
        return net

    made = recipe(awp=0.1, batch_size=24)
    task = Task(registry_toys.SHAPE, registry_toys.CLASSES, ThreatModel("linf", 0.1), network, made.player)
    registry_toys.run(registry_toys.toy(name), made, task=task)
    for found in seen.values():
        at_rest, moved = found[0], found[-1]
        assert float((moved - at_rest).norm() / at_rest.norm()) == pytest.approx(0.1, rel=1e-3)


def test_the_critic_of_codes_moves_no_running_statistics() -> None:
    """The codes that D learns from are made aside: one pass of each batch is counted, that of the moved weights."""
    trained = registry_toys.run(registry_toys.toy("er"), recipe(awp=0.01, batch_size=8))
    found = {int(value) for key, value in weights(trained).items() if key.endswith("num_batches_tracked")}
    assert found == {2 * 3}, "three steps, each on clean and on adversarial images"


def test_a_graph_that_outlives_its_weights_is_explained() -> None:
    method = ER(steps=1, rule="compat_official", critic_width=2)
    with pytest.raises(UserError, match="keeps a graph from one update to the next: set awp: 0"):
        registry_toys.run(method, recipe(awp=0.01, batch_size=8))


@pytest.mark.parametrize("method", [ATPGD(steps=2), TRADES(steps=2), Free(replays=2)])
def test_it_resumes_bit_for_bit(method: Defense, tmp_path: Path) -> None:
    mortal = registry_toys.mortal(method, 10)
    made = recipe(epochs=4, awp=0.02, awp_warmup=0.3, momentum=0.9, ema=0.5)
    with pytest.raises(registry_toys.Died), pytest.MonkeyPatch.context() as patch:
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        run(mortal, made, network=batch_norm_net, checkpoints=tmp_path)
    resumed = run(mortal, made, network=batch_norm_net, checkpoints=tmp_path)
    straight = run(method, made, network=batch_norm_net)
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves


def test_what_is_crafted_is_crafted_at_the_weights_themselves() -> None:
    """All but the loss sees w: the K passes of the attack, then the proxy and the step on the same images."""
    probes: list[Probe] = []

    def network() -> nn.Module:
        net = linear_network([[1.0, -2.0], [0.0, 1.0]])
        probes.append(Probe(net).__enter__())
        return net

    pixels = torch.randint(60, 200, (8, 1, 2, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    samples = DeviceData(Images(pixels.numpy(), (torch.arange(8) % 2).numpy()))
    made = recipe(awp=0.01, batch_size=8)
    of_task = Task((1, 1, 2), 2, ThreatModel("linf", 0.1), network, made.player)
    run(ATPGD(steps=3), made, task=of_task, samples=samples)
    inputs = probes[0].inputs
    assert len(inputs) == 3 + 2 and torch.equal(inputs[3], inputs[4]) and probes[0].frozen == [True] * 3 + [False] * 2
