"""L2L-DA (Jang et al. 2019): a classifier and a recursive generator, rewarded for diverse attacks, by turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.l2l import L2LDATrainer, Path
from casemate.attacks.learned import slope
from casemate.defenses.adversary import AdversaryDefense
from casemate.defenses.crafting import CraftingMode, JointNorm, crafting
from casemate.fields import Count, NonNegative, Positive, Unit, spec
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Player, Task, Update


@spec
class L2LDA(CraftingMode, JointNorm, AdversaryDefense, L2LDATrainer):
    """The generator takes a step up CE + `diversity` x D over all its steps, with two noises for each image, against
    the classifier in the mode of crafting; the classifier one on the batch and both last images that came out of it.

    1 + 2 `steps` forward passes and as many input gradients (the pass at a perturbed image serves the loss and the
    next step's input), then three forward passes and weight gradients, counted in batches of the training size; the
    generator 2 `steps` each. Every switch of the paper's ablation is an option: R is `steps` 1 with `step_factor` 1,
    D is `diversity` 0, delta is `feed_delta`, y is `condition`.
    """

    width: Count = 64
    gradient_norm: Literal["rms", "channel", "image", "none"] = "channel"
    """What an input gradient is divided by: its root mean square in the image, its l2 norm in each channel (code) or
    in the image (paper), or nothing."""
    f_update: Literal["joint", "sum", "successive"] = "joint"
    """One mean over the 3 N images (code), CE(x) + CE(x_adv) on the same forward pass (paper), or two updates, first
    adversarial, then clean (the code's other style, in which the classifier's schedule is the generator's, too)."""
    bn_joint: Literal["concat", "separate"] = "concat"
    """Whether the clean images and the adversarial ones, two for each, share their batch statistics. In "successive"
    updates they never do."""
    clean_warmup: Unit = 0.0
    """Share of the budget at first in which the classifier alone learns, from clean images; 0.01 in the paper's
    setting for MNIST. For the others the paper starts from a clean classifier."""
    init_std: Positive | None = None
    """Standard deviation of the classifier's fresh convolutions; 0.02 in the code for MNIST. None: as they are."""
    generator_lr: Positive = 0.01
    """Of SGD, constant but for "successive" updates; 0.025 for Tiny ImageNet in the paper."""
    generator_momentum: Unit = 0.9
    generator_weight_decay: NonNegative = 0.00001
    max_grad_norm: Positive | None = 1.0
    """Of both players."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        made = super().modules(task)
        if self.init_std is not None:
            for part in made["classifier"].modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.normal_(part.weight, 0.0, self.init_std)
        return made

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for the classifier; SGD for the generator. Both are clipped."""
        own = list(modules["generator"].parameters())
        optimizer = torch.optim.SGD(
            own, lr=self.generator_lr, momentum=self.generator_momentum, weight_decay=self.generator_weight_decay
        )
        classifier = task.player(modules["classifier"].parameters())
        schedule = classifier.schedule if self.f_update == "successive" else None
        return {
            "classifier": replace(classifier, max_grad_norm=self.max_grad_norm),
            "generator": Player(own, optimizer, schedule, max_grad_norm=self.max_grad_norm),
        }

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat = ctx.modules["classifier"], self.threat(ctx)
        if ctx.fraction < self.clean_warmup:
            yield Update(("classifier",), lambda: F.cross_entropy(classifier(x).float(), y))
            return

        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            gradient = slope(classifier, x, untargeted(y))[2]
        pairs = 2 if self.z_dim else 1
        images, labels, gradients = (torch.cat([part] * pairs) for part in (x, y, gradient))
        z = torch.randn(len(images), self.z_dim, generator=ctx.rng).to(x)
        path = self.begin(images, gradients, labels, z)
        crafted: list[Tensor] = []

        def loss() -> Tensor:
            total, x_adv = self.descended(ctx, path, threat)
            # Made before the generator's step. Without noise both images of a pair are the same, and count twice.
            crafted.append(x_adv if self.z_dim else torch.cat([x_adv, x_adv]))
            return total

        yield Update(("generator",), loss)
        yield from self.defend(ctx, x, crafted[0], y)

    def descended(self, ctx: Context, path: Path, threat: ThreatModel) -> tuple[Tensor, Tensor]:
        """(the generator's loss, the images after the last step)."""
        classifier, goal = ctx.modules["classifier"], untargeted(path.labels)
        total, x_adv = path.x.new_zeros(()), path.x
        with crafting(classifier, bn=self.bn_mode_attack):
            rollout = self.rollout(ctx.modules, classifier, path, goal, threat)
            for step, (x_adv, logits, values) in enumerate(rollout, 1):
                if self.loss_at == "every" or step == self.steps:
                    total = total - values.mean()
                if self.z_dim and (self.diversity_at == "every" or step == self.steps):
                    apart = self.apart(x_adv, path.z)
                    total = total - self.diversity * apart
                    ctx.log(apart=apart)
                ctx.log(fooled=goal.reached(logits.argmax(1)).float().mean())
        return (total / self.steps if self.over_steps == "mean" else total), x_adv.detach()

    def defend(self, ctx: Context, x: Tensor, x_adv: Tensor, y: Tensor) -> Iterator[Update]:
        """The classifier's turn, on N images and 2 N adversarial ones."""
        classifier = ctx.modules["classifier"]
        if self.f_update == "successive":
            yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), y.repeat(2)))
            yield Update(("classifier",), lambda: F.cross_entropy(classifier(x).float(), y))
            return

        def loss() -> Tensor:
            clean, adversarial = self.logits(classifier, x, x_adv)
            natural, robust = F.cross_entropy(clean, y), F.cross_entropy(adversarial, y.repeat(2))
            ctx.log(natural=natural, robust=robust)
            return natural + robust if self.f_update == "sum" else (natural + 2 * robust) / 3

        yield Update(("classifier",), loss)
