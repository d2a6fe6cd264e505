"""The other ways to run the same step faster, and what happens where memory or the device gives out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from casemate.attacks.gradient import PGD
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.base import Defense
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.folding import foldable, folding
from casemate.errors import UserError
from casemate.fields import spec
from casemate.networks.base import build_network
from casemate.objectives import cross_entropy
from casemate.randomised import GaussianNoise, drawn
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Update
from casemate.training import loop, memory
from tests.training_toys import CLASSES, SHAPE, Plain, batch_norm_net, data, recipe, run, same, weights

# --- nothing in a step waits for the device -------------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
CALLS = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__)


class Operations(TorchDispatchMode):
    """Operations whose result the host must wait for, gradients and optimizers included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Calls that ask for the host's copy, which on the CPU need no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CALLS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(monkeypatch: pytest.MonkeyPatch, method: Any, **changes: Any) -> list[str]:
    """What in the steps of a run waits; what the loop does between steps is not counted."""
    operations, calls = Operations(), Calls()
    plain = loop._Run._step

    def step(self: Any, *batch: Any) -> None:
        with operations, calls:
            plain(self, *batch)

    monkeypatch.setattr(loop._Run, "_step", step)
    run(method, recipe(momentum=0.9, ema=0.9, max_grad_norm=1.0, **changes), network=batch_norm_net)
    return operations.seen + calls.seen


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits(monkeypatch, ATPGD(steps=2), awp=0.01) == []


@pytest.mark.parametrize(
    "look", [lambda x: x.mean().item(), lambda x: x.cpu(), lambda x: x.sum() > 0 and 1, Tensor.nonzero]
)
def test_one_that_waits_is_seen(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            look(x)
            yield from super().step(ctx, x, y)

    assert len(set(waits(monkeypatch, Looks()))) >= 1


# --- batch norms folded while crafting ------------------------------------------------------------------------------


def moved(net: nn.Module) -> nn.Module:
    """With running statistics and scales that a fold could get wrong."""
    torch.manual_seed(1)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return net


@pytest.mark.parametrize(
    ("name", "options", "pairs"),
    [("resnet20", {}, 19), ("wrn", {"depth": 10, "width": 1}, 3)],
    ids=["after", "before"],
)
def test_the_folded_network_is_the_same_function(name: str, options: Any, pairs: int) -> None:
    """A norm after each convolution, or before: then only those inside a block follow one."""
    net = moved(build_network(name, input_shape=(3, 32, 32), num_classes=10, **options)).double()
    assert sum(norm is not None for _, norm in foldable(net)) == pairs
    assert len(foldable(net)) == sum(isinstance(part, nn.Conv2d) for part in net.modules())
    x, y = torch.rand(3, 3, 32, 32, dtype=torch.double), torch.tensor([0, 1, 2])
    ascent = Ascent(ThreatModel("linf", 0.03), 2, 0.01)

    def craft() -> tuple[Tensor, Tensor, Tensor]:
        with crafting(net):
            at = x.clone().requires_grad_()
            logits = net(at)
            (slope,) = torch.autograd.grad(cross_entropy(logits, untargeted(y)).sum(), at)
            return logits.detach(), slope, ascent(lambda at: cross_entropy(net(at), untargeted(y)), x, x)

    plain = craft()
    said: list[str] = []
    with folding(said.append):
        folded = craft()
    torch.testing.assert_close(folded, plain, rtol=1e-9, atol=1e-9)
    assert not said and all("forward" not in vars(part) for part in net.modules())


def test_norms_are_folded_in_eval_mode_alone_and_come_back_after_an_error() -> None:
    net = batch_norm_net()
    conv, norm = net[0], net[1]
    with folding(print):
        with crafting(net, bn="train"):
            assert "forward" not in vars(conv)
        with pytest.raises(KeyError), crafting(net):
            assert "forward" in vars(conv) and "forward" in vars(norm)
            raise KeyError
    assert "forward" not in vars(conv) and "forward" not in vars(norm)


def test_what_cannot_be_folded_is_said_once() -> None:
    class Before(nn.Module):
        """A norm that reads the image, and a forward pass that depends on values."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if bool(x.sum() > 0) else x

    said: list[str] = []
    net = Before()
    with folding(said.append):
        for _ in range(2):
            with crafting(net):
                net(torch.rand(2, 1, 4, 4))
    assert len(said) == 1 and "no batch norm of Before follows" in said[0]


def test_a_part_that_is_used_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.norm(x)

    ((conv, norm),) = foldable(Twice())
    assert isinstance(conv, nn.Conv2d) and norm is None


def test_a_folded_run_follows_the_plain_one() -> None:
    one, other = (run(ATPGD(steps=2), recipe(epochs=2, fold_norms=flag), network=plain_net) for flag in (False, True))
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=1e-3, atol=1e-4)


def plain_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
    )


def test_folding_and_compiling_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="choose one of them"):
        recipe(compile=True, fold_norms=True)


# --- memory that gives out ------------------------------------------------------------------------------------------


def full(batch: int, most: int) -> None:
    if batch > most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_training_stops_and_names_the_batch_that_fits(tmp_path: Path) -> None:
    @spec
    class Wide(Defense):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            def loss() -> Tensor:
                full(len(x), 4 if ctx.step == 2 else 40)
                return F.cross_entropy(ctx.modules["classifier"](x), y)

            yield Update(("classifier",), loss)

    with pytest.raises(UserError, match="out of memory at step 2") as said:
        run(Wide(), recipe(batch_size=16, epochs=2), samples=data(48))
    assert "batch_size 16: 4 fits" in str(said.value)


def test_memory_that_gives_out_before_the_first_batch_is_one_line() -> None:
    class Large(DeviceData):
        def batches(self, *given: Any, **options: Any) -> Any:
            full(2, 1)

    large = Large(Images(np.zeros((40, 4, 4, 1), np.uint8), np.zeros(40, np.int64)))
    with pytest.raises(UserError, match="out of memory at step 0 with batch_size 10, before a batch was at hand"):
        run(Plain(), recipe(), samples=large)


class Victim(nn.Module):
    """Runs out of memory above `most` images, or above `most` images whose activations a gradient keeps."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.body, self.seen = (
            most,
            nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)),
            0,
        )

    def forward(self, x: Tensor) -> Tensor:
        full(len(x), self.most)
        self.seen = max(self.seen, len(x))
        out: Tensor = self.body(x)
        return out


def test_an_attack_that_does_not_fit_is_made_in_pieces_with_the_same_result() -> None:
    torch.manual_seed(0)
    net = Victim(100)
    system = TorchSystem(net, input_shape=SHAPE, num_classes=CLASSES)
    x, y = torch.rand(20, *SHAPE), torch.arange(20) % CLASSES

    def attack() -> Any:
        return PGD(steps=5, step_size=0.05)(system, x, untargeted(y), ThreatModel("linf", 0.2), seed=3)

    said: list[str] = []
    plain = memory.in_pieces(attack, net, 20, said.append)
    assert not said and net.seen == 20
    net.most, net.seen = 6, 0
    cut = memory.in_pieces(attack, net, 20, said.append)
    assert net.seen == 5 and ["10 at a time" in said[0], "5 at a time" in said[1], len(said)] == [True, True, 2]
    assert torch.equal(plain.success, cut.success)
    torch.testing.assert_close(cut.x_adv, plain.x_adv)
    assert torch.equal(plain.cost.forwards, cut.cost.forwards) and net._compiled_call_impl is None


def test_pieces_repeat_the_noise_of_their_draw() -> None:
    """The gradient is taken when the draw is over, and must be that of the logits that were seen."""
    torch.manual_seed(0)
    net = nn.Sequential(
        GaussianNoise(0.5), nn.Flatten(), nn.Linear(16, 8), GaussianNoise(0.5), nn.Tanh(), nn.Linear(8, 3)
    )
    x = torch.rand(6, *SHAPE)

    def slope() -> Tensor:
        leaf = x.clone().requires_grad_()
        with drawn(net.eval(), "a use"):
            out = net(leaf)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    plain = slope()
    with memory.cut(net, 2):
        torch.testing.assert_close(slope(), plain)


def test_one_image_that_does_not_fit_is_an_error_in_one_line() -> None:
    net = Victim(0)
    with pytest.raises(UserError, match="out of memory with one image"):
        memory.in_pieces(lambda: net.eval()(torch.rand(4, *SHAPE)), net, 4, lambda text: None)
    with pytest.raises(UserError, match="out of memory with 4 images at once"):
        memory.in_pieces(lambda: full(4, 0), None, 4, lambda text: None)


def test_other_errors_stay_what_they_are() -> None:
    def wrong() -> None:
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        memory.in_pieces(wrong, None, 4, print)
    assert memory.out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


def test_a_device_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    class Lost(Plain):
        at = 5

        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            if ctx.step == type(self).at:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            yield from super().step(ctx, x, y)

    made = recipe(epochs=3)
    with pytest.raises(
        UserError, match=r"the device failed at step 5 \(CUDA error.*; the last good checkpoint is kept"
    ):
        run(Lost(), made, checkpoints=tmp_path)
    Lost.at = 99
    assert same(weights(run(Lost(), made, checkpoints=tmp_path)), weights(run(Lost(), made)))
