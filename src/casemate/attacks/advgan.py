"""AdvGAN (Xiao et al. 2018): a generator whose adversarial images a critic shall not tell from clean ones.

As in L2L-DA's comparison it is judged by true labels, cut to the radius and to [0, 1]. The networks are those of
mathcbc/advGAN_pytorch with padding, so that they take images of more than one size. Never a headline: weak by design.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.base import Cost
from casemate.attacks.learned import LearnedAttack, NeedsWeights
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, spec
from casemate.networks.base import Shape, require_divisible
from casemate.objectives import capped_margin
from casemate.system import Offer, View
from casemate.threat import Goal, Norm, ThreatModel, untargeted
from casemate.trainable import Context, Update

SMALLEST = 8


class Generator(nn.Module):
    """N x C x H x W -> the same shape in [-1, 1]: convolutions of widths w, 2w, 4w with instance normalisation (two
    halvings), residual blocks with BatchNorm and reflected borders, two doublings, tanh."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        wide = 4 * width
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(channels, width, 3, padding=1), width),
            *_normed(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
            *_normed(nn.Conv2d(2 * width, wide, 3, 2, 1), wide),
            *(ReflectBlock(wide) for _ in range(blocks)),
            *_normed(nn.ConvTranspose2d(wide, 2 * width, 4, 2, 1, bias=False), 2 * width),
            *_normed(nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), width),
            nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.Tanh(),
        )  # fmt: skip
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class ReflectBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders and BatchNorm, a ReLU between them, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Critic(nn.Module):
    """N x C x H x W -> (N,) in (0, 1), 1 for clean: convolutions of widths w, 2w, 4w, each halving the size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1),
        )  # fmt: skip
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.trunk(x).float().mean((1, 2, 3)))


def _normed(conv: nn.Module, width: int) -> tuple[nn.Module, ...]:
    return conv, nn.InstanceNorm2d(width), nn.ReLU()


def _initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02), BatchNorm scales N(1, 0.02)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02)


@spec
class AdvGANTrainer(LearnedAttack):
    """Fits the pair: the critic by least squares, the generator by `gan` x least squares + `adversarial` x the C&W
    loss of the victim + `distance` x max(||G(x)||_2 - `free_distance`, 0), each a mean over the batch.

    The authors' code sums the C&W loss over a batch of 128, so that its weight there is 128 times the one here.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    width: Count = 8
    """Of the first layer; 32 is meant for CIFAR-10."""
    blocks: Count = 4
    adversarial: NonNegative = 10.0
    gan: NonNegative = 1.0
    distance: NonNegative = 1.0
    free_distance: NonNegative = 0.0
    """The hinge of the paper; the code has none."""
    scores: Literal["logits", "softmax"] = "logits"
    """What the C&W loss is of; the code's is of probabilities, whose slope vanishes where the victim is sure."""
    kappa: NonNegative = 5.0
    """Margin at which the C&W loss stops paying; 0 in the authors' code, which leaves images just across the border
    of the training set, and so a tenth of others that stand."""

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        require_divisible("AdvGAN generator", input_shape, 4)
        if min(input_shape[1:]) < SMALLEST:
            raise UserError(f"advgan needs images of at least 8 x 8 pixels, not {input_shape[1]} x {input_shape[2]}")
        channels = input_shape[0]
        return {
            "generator": Generator(channels, self.width, self.blocks),
            "critic": Critic(channels, self.width),
        }

    def perturb(self, written: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        """x plus what the generator has written, cut to the radius and to [0, 1]."""
        return (x + written.clamp(-threat.radius, threat.radius)).clamp(0.0, 1.0)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, critic, goal = self.victim(ctx), ctx.modules["critic"], untargeted(y)
        objective = capped_margin(self.kappa)
        with ctx.autocast():
            written = ctx.modules["generator"](x).float()
        x_adv = self.perturb(written, x, ctx.threat)

        def critic_loss() -> Tensor:
            clean, adversarial = critic(x), critic(x_adv.detach())
            loss: Tensor = (clean - 1).square().mean() + adversarial.square().mean()
            return loss

        def generator_loss() -> Tensor:
            logits = victim(x_adv).float()
            ctx.log(fooled=goal.reached(logits.detach().argmax(1)).float().mean())
            scores = logits if self.scores == "logits" else F.softmax(logits, 1)
            far: Tensor = (written.flatten(1).norm(dim=1) - self.free_distance).clamp_min(0.0).mean()
            hidden: Tensor = (critic(x_adv) - 1).square().mean()
            return self.gan * hidden + self.distance * far - self.adversarial * objective(scores, goal).mean()

        yield Update(("critic",), critic_loss)
        yield Update(("generator",), generator_loss)


@spec
class AdvGAN(NeedsWeights):
    """The fitted generator's one pass: no further search, and labels suffice."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    trainer: ClassVar[type[LearnedAttack]] = AdvGANTrainer
    aimable: ClassVar[bool] = False

    def search(
        self, fitted: AdvGANTrainer, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal,
        threat: ThreatModel, seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        return fitted.perturb(modules["generator"](x).float(), x, threat)
