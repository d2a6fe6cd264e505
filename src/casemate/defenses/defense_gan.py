"""Defense-GAN (Samangouei et al. 2018): a GAN of clean images, and classification of what it can make of the input.

An optimisation runs inside every prediction, so the system is random and slow, and its own gradients mislead: it is
here as the baseline that adaptive attacks break (Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import crafting
from casemate.fields import Count, NonNegative, Positive, Unit, spec
from casemate.networks.base import Shape
from casemate.networks.gan import ImageCritic, ImageGenerator
from casemate.purification.projection import DefenseGANSystem, Descent
from casemate.system import System, TorchSystem
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Update


@spec
class DefenseGAN(Defense):
    """A Wasserstein GAN with gradient penalty and a classifier, trained side by side; neither sees an attack.

    Per batch: three passes of the critic and one of the classifier, each learner's update in its own precision, and
    one update of the generator after every `critic_steps` batches. Modes: "gan" reconstructs, "off" does not.
    """

    inference_modes: ClassVar[tuple[str, ...]] = ("gan", "off")

    latent: Count = 128
    width: Count = 64
    """Of the generator and the critic."""
    critic_steps: Count = 5
    gan_lr: Positive = 0.0001
    penalty: NonNegative = 10.0
    penalty_norm: Literal["sample", "rows"] = "sample"
    """Of the gradient: one norm per image; or, as the authors' code has it, one for every column of pixels."""
    classifier_on: Literal["original", "reconstruction"] = "original"
    """What the classifier learns: images; or, from `reconstruct_from` on, what the finished GAN makes of them."""
    reconstruct_from: Unit = 0.8
    """Share of the budget after which the GAN stands still and the classifier learns reconstructions."""
    training_steps: Count = 50
    training_restarts: Count = 2
    """The descent for these reconstructions."""
    steps: Count = 200
    restarts: Count = 10
    rate: Positive = 10.0
    momentum: Unit = 0.7
    """The descent at inference."""
    attacked_steps: Count = 50
    attacked_restarts: Count = 2
    """The descent that an attacker searches with; decisions are those of the deployed one."""
    draws: Count = 10
    """Draws of the starts that an attack's gradient averages."""
    votes: Count = 1
    """Draws whose majority is the answer."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        generator = ImageGenerator(task.input_shape, latent=self.latent, width=self.width)
        critic = ImageCritic(task.input_shape, width=self.width)
        return {"classifier": task.network(), "generator": generator, "critic": critic}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for the classifier; Adam at a constant rate, in float32, for the GAN."""

        def gan(name: str) -> Player:
            return task.player(
                modules[name].parameters(), betas=(0.5, 0.9), optimizer="adam", lr=self.gan_lr, weight_decay=0.0,
                schedule="constant", warmup=0.0, max_grad_norm=None, precision="fp32",
            )  # fmt: skip

        return {**super().players(task, modules), "generator": gan("generator"), "critic": gan("critic")}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, generator, critic = (ctx.modules[name] for name in ("classifier", "generator", "critic"))
        seen = x
        if self.classifier_on == "original" or ctx.fraction < self.reconstruct_from:
            codes = torch.randn(2, len(x), self.latent, generator=ctx.rng).to(x.device)
            share = torch.rand(len(x), 1, 1, 1, generator=ctx.rng).to(x.device)

            def critic_loss() -> Tensor:
                with torch.no_grad():
                    fake = generator(codes[0])
                gap = critic(x).mean() - critic(fake).mean()
                slack = self._penalty(critic, x + share * (fake - x))
                ctx.log(gan_gap=gap, gan_penalty=slack)
                loss: Tensor = self.penalty * slack - gap
                return loss

            yield Update(("critic",), critic_loss)
            if (ctx.step + 1) % self.critic_steps == 0:
                yield Update(("generator",), lambda: -critic(generator(codes[1])).mean())
        else:
            descent = Descent(self.training_steps, self.training_restarts, self.rate, self.momentum)
            start = torch.randn(len(x), self.training_restarts, self.latent, generator=ctx.rng).to(x.device)
            with crafting(generator):
                seen, errors = descent(generator, x, start / self.latent**0.5)
            seen = seen.detach()
            ctx.log(reconstruction=errors.mean())
        yield Update(("classifier",), lambda: F.cross_entropy(classifier(seen).float(), y))

    def _penalty(self, critic: nn.Module, between: Tensor) -> Tensor:
        """Mean of (|slope| - 1)^2 at images between real and generated ones."""
        between.requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        norms: Tensor = slope.flatten(1).norm(dim=1) if self.penalty_norm == "sample" else slope.norm(dim=2)
        return (norms - 1).square().mean()

    def system(
        self, modules: dict[str, nn.Module], mode: str, *, input_shape: Shape, num_classes: int, threat: ThreatModel
    ) -> System:
        self.require_mode(mode)
        if mode == "off":
            return TorchSystem(modules["classifier"], input_shape=input_shape, num_classes=num_classes, name=mode)
        return DefenseGANSystem(
            modules["classifier"], cast(ImageGenerator, modules["generator"]),
            Descent(self.steps, self.restarts, self.rate, self.momentum),
            attacked=Descent(self.attacked_steps, self.attacked_restarts, self.rate, self.momentum),
            input_shape=input_shape, num_classes=num_classes, draws=self.draws, votes=self.votes, name=mode,
        )  # fmt: skip
