"""ATLD: every numbered step of its training, who moves when, and its three inference modes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import (
    LINF,
    Bench,
    Probe,
    batch,
    linear_network,
    moved,
    parameters,
    same,
    state,
    tracked,
)
from torch import nn

from casemate.defenses.atld import ATLD, pairing_weight, smoothed
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.networks.critics import read_codes
from casemate.purification.imt import IMT
from casemate.seeding import generator
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted


def small(**options: Any) -> ATLD:
    """A small critic, which meets the clean codes in its own updates only unless it is told."""
    return ATLD(**{"critic_depth": 10, "critic_width": 1, "critic_meets_clean": False, **options})


def test_passes_of_a_step() -> None:
    """Clean, one ascent step, adversarial; the ascent, two input gradients for s, one weight gradient."""
    bench, (x, y) = Bench(small()), batch()
    critic = bench.modules["critic"]
    with Probe(bench.f) as f, Probe(critic) as d:
        bench.step(x, y)
    assert f.train == [False, False, True] and f.frozen == [True, True, False]
    assert f.backwards == 4
    assert d.train == [True] * 5 and d.frozen == [True] + [False] * 4
    assert d.backwards == 5
    assert torch.equal(f.inputs[0], x)


@pytest.mark.parametrize(("align", "f_backwards", "d_forwards"), [("mse", 4, 5), ("gan", 2, 6), ("none", 2, 5)])
def test_the_alignment_costs_what_it_needs(align: Any, f_backwards: int, d_forwards: int) -> None:
    bench, (x, y) = Bench(small(align=align)), batch()
    with Probe(bench.f) as f, Probe(bench.modules["critic"]) as d:
        bench.step(x, y)
    assert (f.backwards, len(d.train)) == (f_backwards, d_forwards)


def test_running_statistics() -> None:
    """D sees the crafting batch, then twice the clean and the adversarial codes apart; f adversarial images only."""
    bench, (x, y) = Bench(small()), batch()
    norm = bench.f.body["conv"][1]  # type: ignore[index]
    conv = copy.deepcopy(bench.f.body["conv"][0])  # type: ignore[index]
    with Probe(bench.f) as f:
        bench.step(x, y)
    assert tracked(bench.modules["critic"]) == 5
    assert tracked(bench.f) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * conv(f.inputs[-1]).detach().mean((0, 2, 3)))


@pytest.mark.parametrize("latent", ["logits", "penultimate"])
@pytest.mark.parametrize("align", ["mse", "gan", "none"])
def test_each_update_moves_its_player_only(align: Any, latent: Any) -> None:
    form = "conv1x1" if latent == "logits" else "conv3x3"
    bench, (x, y) = Bench(small(align=align, latent=latent, critic_form=form)), batch()
    critic = bench.modules["critic"]
    seen = []
    stepping = bench.updates(x, y)
    f_before, d_before = state(bench.f), parameters(critic)
    for players, _ in stepping:
        seen.append(players)
        if players == ("classifier",):
            assert moved(f_before, bench.f)
            assert same(d_before, parameters(critic))
            assert all(p.grad is None for p in critic.parameters())
        else:
            assert same(f_before, state(bench.f))
            assert moved(d_before, critic)
        f_before, d_before = state(bench.f), parameters(critic)
    assert seen == [("classifier",), ("critic",), ("critic",)]


def test_the_gan_alignment_leaves_the_critics_statistics_alone() -> None:
    bench, (x, y) = Bench(small(align="gan")), batch()
    stepping = bench.updates(x, y)
    next(stepping)
    assert tracked(bench.modules["critic"]) == 1  # the crafting pass


def test_the_critic_learns_twice_from_the_same_codes_of_the_old_classifier() -> None:
    bench, (x, y) = Bench(small()), batch()
    old = copy.deepcopy(bench.f)
    with Probe(bench.f) as f, Probe(bench.modules["critic"]) as d:
        bench.step(x, y)
    clean, adversarial = d.inputs[1::2], d.inputs[2::2]
    assert torch.equal(clean[0], clean[1]) and torch.equal(adversarial[0], adversarial[1])
    torch.testing.assert_close(clean[0], old.eval()(x))
    torch.testing.assert_close(adversarial[0], old.train()(f.inputs[-1]))


def test_the_adversary_takes_the_step_of_the_paper() -> None:
    """x_adv = clip(x' - eps sign grad [BCE(D(f(x)), 1) + BCE(D(f(x')), 0)]), x' = x + U(-eps, eps) as it is."""
    bench, (x, y) = Bench(small()), batch()
    f, d = copy.deepcopy(bench.f).eval(), copy.deepcopy(bench.modules["critic"]).train()
    start = LINF.random_start(x, generator("step", 0)).requires_grad_()
    clean, adversarial = d(f(x))[0].sigmoid(), d(f(start))[0].sigmoid()
    ell = F.binary_cross_entropy(clean, torch.ones(8)) + F.binary_cross_entropy(adversarial, torch.zeros(8))
    (gradient,) = torch.autograd.grad(ell, start)
    assert float(gradient.abs().min()) > 0
    expected = start.detach() - LINF.radius * gradient.sign()
    expected = torch.minimum(torch.maximum(expected, x - LINF.radius), x + LINF.radius).clamp(0, 1)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert torch.equal(passes.inputs[1], start.detach())
    torch.testing.assert_close(passes.inputs[-1], expected)


@pytest.mark.parametrize("latent", ["logits", "penultimate"])
def test_the_adversary_moves_to_where_the_critic_is_surer(latent: Any) -> None:
    """A short step: D, with the statistics of its batch, finds the images less clean than where they started."""
    form = "conv1x1" if latent == "logits" else "conv3x3"
    bench, (x, y) = Bench(small(latent=latent, critic_form=form), threat=ThreatModel("linf", 0.003)), batch()
    f, d = copy.deepcopy(bench.f).eval(), copy.deepcopy(bench.modules["critic"]).train()
    with Probe(bench.f.body["conv"]) as passes:
        bench.step(x, y)
    start, x_adv = (read_codes(f, at, latent)[1] for at in passes.inputs[1:])
    assert F.softplus(d(x_adv)[0]).mean().item() < F.softplus(d(start)[0]).mean().item()


def test_the_classifier_goes_the_other_way_with_the_gan_alignment() -> None:
    """The same D, opposite signs: its adversary made the codes look adversarial, f makes them look clean again."""
    scores = {}
    for align in ("none", "gan"):
        bench, (x, y) = Bench(small(align=align), lr=0.01), batch()
        d = copy.deepcopy(bench.modules["critic"]).train()
        with Probe(bench.f) as passes:
            next(bench.updates(x, y))
        scores[align] = d(bench.f.train()(passes.inputs[-1]))[0].sigmoid().mean().item()
    assert scores["gan"] > scores["none"]


def test_the_critic_may_meet_the_clean_codes_while_crafting() -> None:
    """As the code does: the same images, one more clean batch in D's running statistics."""
    assert ATLD().critic_meets_clean
    seen: dict[bool, Any] = {}
    for meets in (False, True):
        bench, (x, y) = Bench(small(critic_meets_clean=meets)), batch()
        with Probe(bench.f) as f, Probe(bench.modules["critic"]) as d:
            bench.step(x, y)
        seen[meets] = (f.inputs, d.inputs, f.backwards, tracked(bench.modules["critic"]), d.backwards)
    assert all(torch.equal(a, b) for a, b in zip(seen[False][0], seen[True][0], strict=True))
    assert torch.equal(seen[True][1][0], seen[True][1][2]), "the clean codes come first"
    assert (seen[False][2:], seen[True][2:]) == ((4, 5, 5), (4, 6, 5))


@pytest.mark.parametrize("latent", ["logits", "penultimate"])
def test_labels_do_not_matter_to_the_adversary(latent: Any) -> None:
    form = "conv1x1" if latent == "logits" else "conv3x3"
    crafted = []
    for shift in (0, 1):
        bench, (x, y) = Bench(small(latent=latent, critic_form=form)), batch()
        with Probe(bench.f.head) as passes:
            bench.step(x, y.roll(shift))
        crafted.append(passes.inputs[-1])
    assert len(passes.inputs) == 3
    assert torch.equal(crafted[0], crafted[1])


def test_the_critic_reads_the_last_map_when_asked() -> None:
    bench, (x, y) = Bench(small(latent="penultimate", critic_form="conv3x3")), batch()
    with Probe(bench.modules["critic"]) as d:
        bench.step(x, y)
    assert {tuple(seen.shape) for seen in d.inputs} == {(8, 6, 4, 4)}


# --- losses -------------------------------------------------------------------------------------------------


def test_smoothed_labels() -> None:
    made = smoothed(torch.tensor([2, 0]), 4, 0.5)
    sixth = 1 / 6
    torch.testing.assert_close(made, torch.tensor([[sixth, sixth, 0.5, sixth], [0.5, sixth, sixth, sixth]]))
    torch.testing.assert_close(smoothed(torch.tensor([1]), 2, 0.0), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("top", "bottom", "weight"),
    [
        ([1.0, -8.0, 3.0], [2.0, -9.0, 1.0], 1.5),  # signed maxima: 3 / 2
        ([-1.0, -2.0, -3.0], [2.0, 1.0, 1.0], 0.0),  # a negative ratio is cut to 0
        ([1.0, 1.0, 1.0], [-2.0, -1.0, -1.0], 0.0),  # a denominator that is not positive
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 0.0),
        ([1.0, 1.0, 1.0], [1e-9, 0.0, 0.0], 1e4),
    ],
)
def test_the_pairing_weight_and_its_guard(top: list[float], bottom: list[float], weight: float) -> None:
    x_adv = torch.zeros(3, requires_grad=True)
    found = pairing_weight((torch.tensor(top) * x_adv).sum(), (torch.tensor(bottom) * x_adv).sum(), x_adv)
    assert not found.requires_grad
    assert float(found) == pytest.approx(weight)


@pytest.mark.parametrize("divisor", [2.0, 10.0])
def test_the_classifiers_loss_by_hand(divisor: float) -> None:
    weight = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]
    bench = Bench(small(pairing_divisor=divisor), lambda: linear_network(weight))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        (_, loss), *_ = bench.step(x, y)
    w, x_adv = torch.tensor(weight).double(), passes.inputs[-1].view(2, 2).double()
    z, clean, t = x_adv @ w.T, x.view(2, 2).double() @ w.T, torch.full((2, 3), 0.25).double()
    t[[0, 1], y] = 0.5
    entropy = -(t * z.log_softmax(1)).sum(1).mean()
    pairing = ((z - clean) ** 2).mean()
    top = ((z.softmax(1) - t) / 2 @ w).max()  # d entropy / d x_adv, a batch of two
    bottom = (2 * (z - clean) / 6 @ w).max()
    assert float(top) > 0 and float(bottom) > 0
    assert loss == pytest.approx(float(entropy + top / bottom / divisor * pairing), rel=1e-5)


def test_the_critics_loss_by_hand() -> None:
    bench, (x, y) = Bench(small()), batch()
    before = copy.deepcopy(bench.modules["critic"])
    with Probe(bench.modules["critic"]) as d:
        losses = [loss for players, loss in bench.step(x, y) if players == ("critic",)]
    (clean, clean_classes), (adv, adv_classes) = before(d.inputs[1]), before(d.inputs[2])
    t = torch.full((8, 4), 1 / 6).scatter(1, y[:, None], 0.5)
    expected = -clean.sigmoid().log().mean() - (1 - adv.sigmoid()).log().mean()
    expected = (
        expected - (t * clean_classes.log_softmax(1)).sum(1).mean() - (t * adv_classes.log_softmax(1)).sum(1).mean()
    )
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[1] < losses[0]


def test_the_gan_alignment_rewards_codes_that_look_clean() -> None:
    """f's loss is the entropy plus log(1 - D) of its adversarial codes, D with its own batch's statistics."""
    bench, (x, y) = Bench(small(align="gan")), batch()
    d = copy.deepcopy(bench.modules["critic"]).train()
    with Probe(bench.modules["critic"]) as seen:
        (_, loss), *_ = bench.step(x, y)
    codes = seen.inputs[1]
    entropy = F.cross_entropy(codes, smoothed(y, 4, 0.5))
    assert loss == pytest.approx((entropy + (1 - d(codes)[0].sigmoid()).log().mean()).item(), rel=1e-5)


def test_no_radius_pairs_a_network_without_batch_norm_with_itself() -> None:
    bench = Bench(small(), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]), ThreatModel("linf", 0.0))
    x, y = torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])
    expected = F.cross_entropy(bench.f(x), smoothed(y, 2, 0.5)).item()
    (_, loss), *_ = bench.step(x, y)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_it_learns_one_batch() -> None:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU())
    f = Classifier(input_shape=(1, 6, 6), num_classes=4, layers={"fc": hidden}, head=nn.Linear(16, 4))
    defense, threat = small(critic_lr=0.01), ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(defense, lambda: f, threat, lr=0.02, optimizer=torch.optim.Adam), batch()
    for _ in range(80):
        bench.step(x, y)
    targets = smoothed(y, 4, 0.5)
    floor = float(-(targets * targets.log()).sum(1).mean())
    assert float(bench.ctx.logs["entropy"]) < floor + 0.02
    assert bool((f(x).argmax(1) == y).all())
    assert float(bench.ctx.logs["score_clean"]) > float(bench.ctx.logs["score_adv"]) + 0.3


# --- inference ----------------------------------------------------------------------------------------------


def systems(bench: Bench, **options: Any) -> dict[str, TorchSystem]:
    made = {}
    for mode in small().inference_modes:
        system = bench.defense.system(
            bench.modules, mode, input_shape=(1, 6, 6), num_classes=4, threat=ThreatModel("linf", 0.1), **options
        )
        assert isinstance(system, TorchSystem)
        made[mode] = system
    return made


def test_the_three_modes() -> None:
    bench, (x, y) = Bench(small(imt_band=(0.2, 0.8), imt_steps=2, imt_step=0.5)), batch()
    bench.step(x, y)
    made = systems(bench)
    assert small().inference_modes[0] == "imt"
    assert {mode: system.changes_inference for mode, system in made.items()} == {
        "imt": True, "limited": True, "off": False
    }  # fmt: skip
    rules = {}
    for mode in ("imt", "limited"):
        purification = made[mode].purification
        assert isinstance(purification, IMT)
        rules[mode] = purification.spec
    assert rules["imt"]["rule"] == "full" and rules["limited"]["rule"] == "interval"
    assert rules["limited"]["band"] == [0.2, 0.8]
    assert (rules["imt"]["steps"], rules["imt"]["step"], rules["imt"]["radius"]) == (2, 0.5, 0.1)
    with made["off"].frozen():
        assert torch.equal(made["off"].logits(x), bench.f(x))
    with made["imt"].frozen():
        purified = made["imt"].purification
        assert purified is not None and torch.equal(made["imt"].logits(x), bench.f(purified(x)))
    assert len({system.hash() for system in made.values()}) == 3


def test_the_limited_form_may_follow_the_section_on_the_method() -> None:
    """Half a step while the chance of "adversarial", one minus the score, is below the threshold."""
    bench = Bench(small(imt_rule="threshold", imt_threshold=0.3))
    imt = systems(bench)["limited"].purification
    assert isinstance(imt, IMT)
    chances = torch.tensor([0.0, 0.29, 0.31, 0.5, 1.0])
    scores = torch.logit((1 - chances).double()).clamp(-800, 800)
    assert imt.strength(scores).tolist() == [0.5, 0.5, 1, 1, 1]
    assert imt.strength(torch.tensor([30.0, 200.0])).tolist() == [0.5, 0.5], "a score that rounds to 1"
    full = systems(bench)["imt"].purification
    assert isinstance(full, IMT) and full.strength(scores).tolist() == [1.0] * 5
    hashes = {
        systems(Bench(small(imt_rule=rule, imt_threshold=edge)))["limited"].hash()
        for rule, edge in (("interval", 0.3), ("interval", 0.5), ("threshold", 0.3), ("threshold", 0.5))
    }
    assert len(hashes) == 3, "the threshold counts where it is the rule"


def test_the_other_limited_form_is_attacked_like_the_usual_one() -> None:
    bench, (x, y) = Bench(small(imt_rule="threshold")), batch()
    system = systems(bench)["limited"]
    attack = system.adaptive_attacks()["mask_control"]
    assert bool(LINF.contains(attack(system, x, untargeted(y), LINF).x_adv, x).all())
    assert json.loads(json.dumps(system.purification.spec))["band"] == [0.5, 2.0]  # type: ignore[union-attr]


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(UserError, match="ATLD has no inference mode 'limmited'; did you mean 'limited'"):
        bench = Bench(small())
        bench.defense.system(bench.modules, "limmited", input_shape=(1, 6, 6), num_classes=4, threat=LINF)


def test_another_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"atld moves along signs and needs an linf threat model, not l2 0\.5"):
        Bench(small(), threat=ThreatModel("l2", 0.5))


def test_a_batch_of_one_is_refused() -> None:
    x, y = batch(1)
    with pytest.raises(UserError, match="set drop_last"):
        Bench(small()).step(x, y)


def test_the_critics_optimizer_is_its_own() -> None:
    bench = Bench(small(critic_lr=0.02, critic_momentum=0.5, critic_weight_decay=0.1))
    (group,) = bench.players["critic"].optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.5, 0.1)
    assert bench.players["critic"].schedule is None
