"""The contract of `Update` and `Player`, each against the same thing written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_toys import CLASSES, SHAPE, Learned, batch_norm_net, data, linear, recipe, run, task

from casemate.trainable import Context, Player, Task, Trainable, Update


class Scripted(Trainable):
    """Two linear nets `a` and `b`, and a step given by the test."""

    def __init__(self, step: Callable[[Context, Tensor, Tensor], Iterator[Update]], **changes: object) -> None:
        self._step, self._changes = step, changes

    def modules(self, task: Task) -> dict[str, nn.Module]:
        return {"a": linear(), "b": linear()}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        return {name: task.player(module.parameters(), **self._changes) for name, module in modules.items()}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        return self._step(ctx, x, y)


ONE_STEP = recipe(batch_size=40)


def copied(module: nn.Module) -> nn.Module:
    """The module as it is at the start of a step, to be moved by hand."""
    twin = linear()
    twin.load_state_dict(module.state_dict())
    return twin


def descend(module: nn.Module, loss: Tensor, lr: float = 0.1, retain: bool = False) -> None:
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=retain)
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter -= lr * gradient


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=0, atol=1e-7) for p, q in pairs)


def test_two_players_in_one_update_descend_on_one_loss() -> None:
    seen: dict[str, nn.Module] = {}

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        a, b = copied(ctx.modules["a"]), copied(ctx.modules["b"])
        by_hand = F.cross_entropy(a(x) + b(x), y)
        descend(a, by_hand, retain=True)
        descend(b, by_hand)
        seen.update(a=a, b=b)
        yield Update(("a", "b"), lambda: F.cross_entropy(ctx.modules["a"](x) + ctx.modules["b"](x), y))

    trained = run(Scripted(step), ONE_STEP)
    assert equal(trained.modules["a"], seen["a"]) and equal(trained.modules["b"], seen["b"])
    assert trained.curves[0].keys() == {"epoch", "loss", "lr"}


def test_one_player_updated_twice_sees_its_own_first_update() -> None:
    seen: dict[str, nn.Module] = {}

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        a = copied(ctx.modules["a"])
        for _ in range(2):
            descend(a, F.cross_entropy(a(x), y))
        seen.update(a=a, b=copied(ctx.modules["b"]))
        for _ in range(2):
            yield Update(("a",), lambda: F.cross_entropy(ctx.modules["a"](x), y))

    trained = run(Scripted(step), ONE_STEP)
    assert equal(trained.modules["a"], seen["a"]) and equal(trained.modules["b"], seen["b"])


def test_only_the_named_player_gets_a_gradient() -> None:
    grads: list[bool] = []

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        a, b = ctx.modules["a"], ctx.modules["b"]
        yield Update(("b",), lambda: F.cross_entropy(a(x) + b(x), y))
        grads.extend(p.grad is not None for p in (*a.parameters(), *b.parameters()))

    trained = run(Scripted(step), ONE_STEP)
    assert grads == [False, False, True, True]
    assert "loss_b" in trained.curves[0] and "loss" not in trained.curves[0]
    assert all(p.grad is None for m in trained.modules.values() for p in m.parameters()), "cleared at the end"


def test_extra_leaves_receive_a_gradient_in_the_same_pass() -> None:
    found: dict[str, Tensor] = {}

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        noise = torch.zeros_like(x).requires_grad_()
        a = copied(ctx.modules["a"])
        (found["by hand"],) = torch.autograd.grad(F.cross_entropy(a(x + noise), y), noise)
        yield Update(("a",), lambda: F.cross_entropy(ctx.modules["a"](x + noise), y), extra_leaves=(noise,))
        assert noise.grad is not None
        found["loop"] = noise.grad

    run(Scripted(step), ONE_STEP)
    assert torch.equal(found["loop"], found["by hand"]) and found["loop"].abs().sum() > 0


def test_zero_grad_false_adds_to_the_steps_earlier_updates_only() -> None:
    """Gradient of b x is x: with it kept, the second update of a step moves by 2 x, and no step inherits any."""
    moved: list[float] = []

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        bias = ctx.modules["a"][1].bias  # type: ignore[index]
        for kept in (False, False):
            before = bias[0].item()
            yield Update(("a",), lambda: bias[0] * 3.0, zero_grad=kept)
            moved.append(round(before - bias[0].item(), 4))

    run(Scripted(step), recipe(batch_size=20))
    assert moved == [0.3, 0.6, 0.3, 0.6]


def test_gradients_are_clipped_to_their_norm() -> None:
    moved: list[float] = []

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        bias = ctx.modules["a"][1].bias  # type: ignore[index]
        before = bias.detach().clone()
        yield Update(("a",), lambda: 300.0 * bias[0] + 400.0 * bias[1])
        moved.extend((before - bias).tolist())

    run(Scripted(step, max_grad_norm=1.0), ONE_STEP)
    assert moved == pytest.approx([0.06, 0.08, 0.0], abs=1e-6)


def test_after_step_clips_weights_after_every_update() -> None:
    largest: list[float] = []

    class Clipped(Scripted):
        def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
            def clip() -> None:
                for p in modules["a"].parameters():
                    p.data.clamp_(-0.01, 0.01)

            return {"a": task.player(modules["a"].parameters(), after_step=clip)}

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        for _ in range(2):
            yield Update(("a",), lambda: F.cross_entropy(ctx.modules["a"](x), y))
            largest.append(max(p.abs().max().item() for p in ctx.modules["a"].parameters()))

    run(Clipped(step), ONE_STEP)
    assert len(largest) == 2 and max(largest) <= 0.0100001


def test_a_parameter_that_the_loss_does_not_reach_stays() -> None:
    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield Update(("a", "b"), lambda: F.cross_entropy(ctx.modules["a"](x), y))

    start: dict[str, nn.Module] = {}

    class Watched(Scripted):
        def modules(self, task: Task) -> dict[str, nn.Module]:
            made = super().modules(task)
            start.update({name: copied(m) for name, m in made.items()})
            return made

    trained = run(Watched(step), ONE_STEP)
    assert equal(trained.modules["b"], start["b"]) and not equal(trained.modules["a"], start["a"])


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda ctx, x, y: Update(("c",), lambda: ctx.modules["a"](x).sum()), "players: a, b"),
        (lambda ctx, x, y: Update(("a",), lambda: ctx.modules["a"](x)), "must be a scalar"),
    ],
)
def test_a_wrong_update_is_named(update: Callable[[Context, Tensor, Tensor], Update], said: str) -> None:
    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield update(ctx, x, y)

    with pytest.raises(ValueError, match=said):
        run(Scripted(step), ONE_STEP)


def test_a_learned_attack_moves_its_generator_and_never_the_victim() -> None:
    torch.manual_seed(0)
    victim = batch_norm_net().train()
    before = {key: t.clone() for key, t in victim.state_dict().items()}
    made = recipe(epochs=3, lr=10.0)
    of_task = task(made, victim=victim)
    trained = run(Learned(), made, task=of_task)

    delta = trained.modules["generator"].state_dict()["delta"]
    assert delta.abs().max().item() == pytest.approx(0.1), "clipped by after_step"
    assert all(torch.equal(before[key], t) for key, t in victim.state_dict().items()), "batch statistics too"
    assert all(p.grad is None and p.requires_grad for p in victim.parameters())
    assert victim.training, "its mode is put back"
    samples = data()
    x, y = samples.x(torch.arange(40)), samples.labels
    victim.eval()
    with torch.no_grad():
        attacked = F.cross_entropy(victim(trained.modules["generator"](x)), y)
        assert attacked > F.cross_entropy(victim(x), y)


def test_draw_gives_images_of_the_wanted_labels_and_repeats_itself() -> None:
    drawn: list[Tensor] = []

    def step(ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        images, labels = ctx.draw(len(y), y)
        assert torch.equal(labels, y) and images.shape == x.shape
        assert torch.equal(images[:, 0, 0, :CLASSES].argmax(1), y), "the class is written into the image"
        any_image, _ = ctx.draw(5)
        assert any_image.shape == (5, *SHAPE)
        drawn.append(torch.cat([images, any_image]))
        yield Update(("a",), lambda: F.cross_entropy(ctx.modules["a"](x), y))

    run(Scripted(step), recipe())
    run(Scripted(step), recipe())
    assert len(drawn) == 8 and not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(drawn[i], drawn[i + 4]) for i in range(4))
