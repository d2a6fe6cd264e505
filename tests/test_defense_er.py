"""ER-Classifier: passes, who moves when, losses by hand, the authors' quirks one by one, and every option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_toys import LINF, SHAPE, Bench, batch, first_layer, network, same, straight_and_resumed
from stepping import Probe, tracked
from torch import nn
from training_toys import same as same_weights
from training_toys import weights

from casemate.defenses.er import ER
from casemate.errors import UserError
from casemate.networks.base import Classifier, build_network
from casemate.networks.encoders import encoder_parameters
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.training.recipe import Recipe


def small(**options: Any) -> ER:
    return ER(**{"steps": 3, "critic_width": 16, "regulariser": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "forwards", "backwards"),
    [
        ({"steps": 20}, 22, 22),  # DEFENSES 9: K + 2 forwards, K input gradients, 2 weight gradients
        ({"min_max": False}, 1, 1),
        ({"rule": "separate", "steps": 20}, 24, 24),
        ({"rule": "separate", "min_max": False}, 2, 2),
        ({"rule": "compat_official", "steps": 20}, 25, 24),
        ({"rule": "compat_official", "steps": 20, "pgd_labels": "true"}, 24, 24),
        ({"rule": "compat_official", "min_max": False}, 2, 2),
    ],
)
def test_passes_of_the_encoder(options: dict[str, Any], forwards: int, backwards: int) -> None:
    bench, (x, y) = Bench(small(**options)), batch()
    with first_layer(bench) as q:
        bench.step(x, y)
    assert (len(q.train), q.backwards) == (forwards, backwards)
    crafted = forwards - sum(q.train)
    assert q.train == [False] * crafted + [True] * (forwards - crafted)
    assert q.frozen == [True] * crafted + [False] * (forwards - crafted)


def test_each_update_moves_its_players_only() -> None:
    bench, (x, y) = Bench(small()), batch()
    seen, before = [], [bench.encoder(), bench.part("head"), bench.part("critic")]
    for players in bench.stepping(x, y):
        after = [bench.encoder(), bench.part("head"), bench.part("critic")]
        stood = [same(one, other) for one, other in zip(before, after, strict=True)]
        seen.append((players, stood))
        before = after
    assert seen == [(("critic",), [True, True, False]), (("encoder", "head"), [False, False, True])]


def test_players_are_disjoint_and_their_rates_are_shares_of_the_recipes() -> None:
    bench = Bench(small(head_lr_scale=0.2, critic_lr_scale=0.25))
    own = {name: {id(p) for p in player.parameters} for name, player in bench.players.items()}
    assert not own["encoder"] & own["head"] and not own["encoder"] & own["critic"] and not own["head"] & own["critic"]
    assert own["encoder"] | own["head"] == {id(p) for p in bench.f.parameters()}
    rates = {name: player.optimizer.param_groups[0]["lr"] for name, player in bench.players.items()}
    assert rates == pytest.approx({"encoder": 0.01, "head": 0.002, "critic": 0.0025})


@pytest.mark.parametrize("rule", ["joint", "separate", "compat_official"])
def test_the_critics_parameters_are_clipped(rule: Any) -> None:
    bench, (x, y) = Bench(small(critic_clip=0.02, rule=rule)), batch()
    assert max(float(p.detach().abs().max()) for p in bench.modules["critic"].parameters()) > 0.02
    bench.step(x, y)
    assert max(float(p.detach().abs().max()) for p in bench.modules["critic"].parameters()) <= 0.02


def test_clean_and_adversarial_images_pass_apart() -> None:
    """Running statistics move twice, and the codes of the clean images depend on clean images only."""
    bench, (x, y) = Bench(small()), batch()
    with first_layer(bench) as q:
        bench.step(x, y)
    assert tracked(bench.f.body) == 2
    assert torch.equal(q.inputs[-2], bench.f.normalise(x)) and not torch.equal(q.inputs[-1], q.inputs[-2])


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ce_on", "output"), [("avg", "logsigmoid"), ("adv_only", "linear")])
def test_both_losses_by_hand(ce_on: Any, output: Any) -> None:
    bench, (x, y) = Bench(small(ce_on=ce_on, critic_output=output, critic_clip=10.0)), batch()
    f, d = copy.deepcopy(bench.f).train(), copy.deepcopy(bench.modules["critic"])
    with first_layer(bench) as q:
        (_, critic_loss), (_, joint_loss) = bench.step(x, y)
    x_adv = (q.inputs[-1] + 1) / 2  # the network's input layer is 2 x - 1
    codes = [f.features(x), f.features(x_adv)]
    rng = generator("step", 0)
    torch.rand(x.shape, generator=rng)  # the start of the ascent
    prior = torch.randn(16, 3, generator=rng)
    both = torch.cat(codes)

    def read(critic: Any, z: torch.Tensor) -> torch.Tensor:
        out = critic.layers(z)[:, 0]
        return out.sigmoid().log() if output == "logsigmoid" else out

    assert critic_loss == pytest.approx((read(d, prior).mean() - read(d, both).mean()).item(), rel=1e-4, abs=1e-6)
    entropies = [F.cross_entropy(f.head(z), y).item() for z in codes]
    expected = sum(entropies) / 2 if ce_on == "avg" else entropies[1]
    # Q and C meet the critic that has just learnt.
    expected += 0.1 * read(bench.modules["critic"], both).mean().item()
    assert joint_loss == pytest.approx(expected, rel=1e-4)


def test_the_critic_learns_to_tell_codes_from_the_prior_and_the_encoder_follows() -> None:
    """With a strong regulariser and no labels to speak of, codes come nearer to N(0, I) in the critic's eyes."""
    options = {"min_max": False, "regulariser": 100.0, "critic_output": "linear", "critic_clip": 0.1}
    bench, (x, y) = Bench(small(**options, critic_lr_scale=2.0)), batch(32)
    with torch.no_grad():
        bench.f.body["code"].bias.fill_(6.0)  # type: ignore[union-attr, operator]
    bench.f.train()
    far = float(bench.f.features(x).detach().mean())
    for _ in range(60):
        bench.step(x, y)
    near = float(bench.f.features(x).detach().mean())
    assert far > 4 and near < far - 0.5


# --- crafting -----------------------------------------------------------------------------------------------


def test_the_start_is_not_cut_and_the_end_is_in_the_ball() -> None:
    bench = Bench(small(steps=4), threat=ThreatModel("linf", 0.4))
    x, y = batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    start = bench.threat.random_start(x, generator("step", 0))
    assert torch.equal(passes.inputs[0], start) and float(start.min()) < 0
    with first_layer(bench) as q:
        bench.step(x, y)
    x_adv = (q.inputs[-1] + 1) / 2
    assert bool(bench.threat.contains(x_adv, x).all()) and not torch.allclose(x_adv, x)


@pytest.mark.parametrize(
    ("options", "label_free"),
    [({}, False), ({"pgd_labels": "predicted"}, True), ({"rule": "compat_official"}, True)],
)
def test_predicted_labels_make_crafting_label_free(options: dict[str, Any], label_free: bool) -> None:
    crafted = []
    for shift in (0, 1):
        bench, (x, y) = Bench(small(**options)), batch()
        with first_layer(bench) as q:
            bench.step(x, y.roll(shift))
        adversarial = [seen for seen, train in zip(q.inputs, q.train, strict=True) if train]
        crafted.append(adversarial[1])
    assert torch.equal(*crafted) == label_free


def test_predicted_labels_are_those_of_the_network() -> None:
    def linear() -> Classifier:
        made = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        made[0].weight.data, made[1].weight.data = torch.eye(2), torch.tensor([[1.0, -2.0], [0.0, 1.0]])
        layers = {"flat": nn.Flatten(), "code": made[0]}
        return Classifier(input_shape=(1, 1, 2), num_classes=2, layers=layers, head=made[1])

    x, wrong = torch.tensor([[[[0.7, 0.1]]], [[[0.2, 0.6]]]]), torch.tensor([1, 0])
    moved = {}
    for labels in ("true", "predicted"):
        bench = Bench(small(steps=1, step_factor=2.0, pgd_labels=labels), network=linear)
        with Probe(bench.f.body["flat"]) as passes:
            bench.step(x, wrong)
        moved[labels] = passes.inputs[-1] - x
    # True labels are wrong here, so the two directions are opposite at the corners of the ball.
    torch.testing.assert_close(moved["true"].clamp(-0.1, 0.1), -moved["predicted"].clamp(-0.1, 0.1))
    assert float(moved["predicted"][0, 0, 0, 0]) < 0  # away from class 0, which the first image is


def test_delay_puts_adversarial_images_off() -> None:
    bench, (x, y) = Bench(small(delay=0.5)), batch()
    counts = []
    for fraction in (0.4, 0.5):
        with first_layer(bench) as q:
            bench.step(x, y, fraction=fraction)
        counts.append(len(q.train))
    assert counts == [1, 5]


# --- the paper's steps ----------------------------------------------------------------------------------------


def test_separate_steps_are_those_of_the_joint_loss_taken_apart() -> None:
    """With plain SGD the encoder's two moves are the gradients of the two terms, the second at moved weights; the
    head sees the first alone."""
    sgd = Recipe(epochs=1, lr=1e-4, optimizer="sgd", momentum=0.0, precision="fp32")
    apart, (x, y) = Bench(small(rule="separate", regulariser=30.0, critic_clip=1e6), recipe=sgd), batch()
    joint = Bench(small(regulariser=30.0, critic_clip=1e6), recipe=sgd)
    q_before, moves, heads = apart.encoder(), [], []
    for players in apart.stepping(x, y):
        moves.append(
            (players, torch.cat([(a - b).flatten() for a, b in zip(q_before, apart.encoder(), strict=True)]))
        )
        q_before = apart.encoder()
        heads.append(apart.part("head"))
    assert [players for players, _ in moves] == [("critic",), ("encoder", "head"), ("encoder",)]
    assert same(heads[1], heads[2]) and not same(heads[0], heads[1])
    (_, stood), (_, named), (_, aligned) = moves
    assert not stood.any() and aligned.norm() > 0
    before = joint.encoder()
    joint.step(x, y)
    whole = torch.cat([(a - b).flatten() for a, b in zip(before, joint.encoder(), strict=True)])
    assert F.cosine_similarity(whole - named, aligned, dim=0) > 0.95
    assert same(joint.part("head"), heads[-1])


# --- the authors' step --------------------------------------------------------------------------------------


def test_the_official_sequence() -> None:
    bench, (x, y) = Bench(small(rule="compat_official")), batch()
    assert list(bench.stepping(x, y)) == [("critic",)] * 2 + [("encoder", "head")] + [("encoder",)] * 2
    bench = Bench(small(rule="compat_official", min_max=False))
    assert list(bench.stepping(x, y)) == [("critic",), ("encoder", "head"), ("encoder",)]


def test_the_official_critic_and_encoder_step_on_sums_of_gradients() -> None:
    """With plain SGD the second steps show the gradients of the first ones again."""
    sgd = Recipe(epochs=1, lr=0.1, optimizer="sgd", momentum=0.0, precision="fp32")
    bench, (x, y) = Bench(small(rule="compat_official", critic_clip=1e6), recipe=sgd), batch()
    d_before, d_moves, q_before, q_moves = bench.part("critic"), [], bench.encoder(), []
    gradients = []
    for players in bench.stepping(x, y):
        d_moves.append([a - b for a, b in zip(d_before, bench.part("critic"), strict=True)])
        q_moves.append([a - b for a, b in zip(q_before, bench.encoder(), strict=True)])
        d_before, q_before = bench.part("critic"), bench.encoder()
        if players == ("critic",):
            gradients.append([p.grad.clone() for p in bench.modules["critic"].parameters()])  # type: ignore[union-attr]
    rate = 0.1 * 0.5
    for move, gradient in zip(d_moves[1], gradients[1], strict=True):
        torch.testing.assert_close(move, rate * gradient, rtol=1e-3, atol=1e-7)
    # The regulariser is weak beside the cross-entropy, so the encoder's three moves look alike only if it adds up.
    first, second, third = (torch.cat([m.flatten() for m in moves]) for moves in q_moves[2:])
    assert F.cosine_similarity(first, second, dim=0) > 0.99 and F.cosine_similarity(first, third, dim=0) > 0.9
    only = torch.cat([g.flatten() for g in gradients[0]]), torch.cat([g.flatten() for g in gradients[1]])
    assert not torch.allclose(*only, rtol=0.1)


def test_official_training_freezes_statistics_after_the_first_epoch() -> None:
    bench, (x, y) = Bench(small(rule="compat_official")), batch()
    bench.step(x, y)
    count = tracked(bench.f.body)
    assert count == 4
    bench.step(x, y, epoch=1)
    assert tracked(bench.f.body) == count
    joint = Bench(small())
    joint.step(x, y, epoch=1)
    assert tracked(joint.f.body) == 2


# --- as a whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"min_max": False}, {"steps": 2}, {"steps": 2, "rule": "separate"}, {"steps": 2, "rule": "compat_official"}],
)
def test_it_learns_one_batch(options: dict[str, Any]) -> None:
    bench, (x, y) = Bench(small(**options, head_lr_scale=1.0), threat=ThreatModel("linf", 0.02)), batch()
    bench.f.eval()
    before = F.cross_entropy(bench.f(x), y).item()
    for _ in range(60):
        bench.step(x, y)
    bench.f.eval()
    assert F.cross_entropy(bench.f(x), y).item() < 0.3 * before
    assert bool((bench.f(x).argmax(1) == y).all())


def test_batches_of_one_need_a_network_without_batch_norm() -> None:
    x, y = batch(1)
    with pytest.raises(UserError, match="set drop_last"):
        Bench(small()).step(x, y)
    with pytest.raises(UserError, match="set drop_last"):
        Bench(small(rule="compat_official")).step(x, y)
    options: dict[str, Any] = {"width": 2, "hidden": 8, "code": 3, "batch_norm": False}
    plain = lambda: build_network("er_vgg", input_shape=(1, 16, 16), num_classes=4, **options)  # noqa: E731
    bench = Bench(small(), network=plain)
    bench.step(torch.rand(1, 1, 16, 16), y)


def test_the_slope_of_the_defaults_is_the_papers() -> None:
    made = ER().ascent(ThreatModel("linf", 0.3), 0.0)
    assert (made.steps, made.step_size) == (40, pytest.approx(0.01))


def test_inference_is_the_classifier_alone() -> None:
    bench, (x, _) = Bench(small()), batch()
    system = bench.defense.system(bench.modules, "plain", input_shape=SHAPE, num_classes=4, threat=LINF)
    with system.frozen():
        assert torch.equal(system.logits(x), bench.f.head(bench.f.features(x)))
    assert not system.changes_inference


@pytest.mark.parametrize("rule", ["joint", "separate", "compat_official"])
def test_a_resumed_run_is_an_unbroken_one(rule: Any, tmp_path: Any) -> None:
    straight, resumed = straight_and_resumed(small(steps=1, rule=rule), tmp_path)
    assert same_weights(weights(resumed), weights(straight))
    assert same_weights(weights(resumed, "critic"), weights(straight, "critic"))


def test_the_encoders_parameters_are_its_own() -> None:
    f = network()
    assert len(encoder_parameters(f)) + len(list(f.head.parameters())) == len(list(f.parameters()))
