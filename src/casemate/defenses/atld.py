"""ATLD (Qian et al. 2021): adversarial training with latent distributions, and IMT at inference.

One trained pair (f, D) and three ways to use it: "imt" is ATLD, "limited" ATLD+, "off" ATLD-. Training follows the
authors' code where the paper differs (LitterQ/ATLD-pytorch); D says 1 for clean codes and 0 for adversarial ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CleanForward, CraftingMode, crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, Unit, spec
from casemate.networks.base import Classifier, Shape
from casemate.networks.critics import Critic, build_critic, read_codes
from casemate.purification.imt import IMT
from casemate.system import System, TorchSystem
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Update

LARGEST, SMALLEST = 1e4, 1e-12  # of the pairing weight, and of the gradient it divides by
BEYOND = 2.0  # above every score: one that is 1 in float32 is still inside the band


@spec
class ATLD(AscentSchedule, CraftingMode, CleanForward, Defense):
    """The adversary moves codes to where D is surer of "adversarial" (no labels), D learns to tell codes apart and
    to classify them, and f learns smoothed labels on adversarial images plus an alignment with its clean logits.

    Three forward passes of f, three input gradients and one weight gradient per batch (with align "mse" and one
    step); D sees 1 + 2 `critic_updates` batches in train mode, each with its own batch statistics.
    """

    inference_modes: ClassVar[tuple[str, ...]] = ("imt", "limited", "off")
    batch_coupled: ClassVar[bool] = True

    steps: Count = 1
    step_factor: Positive = 1.0
    latent: Literal["logits", "penultimate"] = "logits"
    """What D reads: the logits, as in the code, or the features before the head, as in the paper."""
    align: Literal["mse", "gan", "none"] = "mse"
    """What f adds to its cross-entropy: s / `pairing_divisor` x MSE of logits (code), log(1 - D) (paper), nothing."""
    pairing_divisor: Positive = 2.0
    """2 for 10 classes, 10 for 100 classes, in the code."""
    smoothing: Unit = 0.5
    """The true class has target 1 - smoothing, the others share the rest."""
    critic_form: Literal["conv1x1", "conv3x3"] = "conv1x1"
    """The same function of logits; "conv3x3" has the published tensor shapes, and eight ninths of dead weights."""
    critic_depth: Count = 28
    critic_width: Count = 5
    critic_updates: Count = 2
    critic_meets_clean: Flag = True
    """Pass the clean codes through D while crafting, too, as the code does. The images are the same; D's running
    statistics, which inference uses, have one more clean batch in each step."""
    critic_lr: Positive = 0.001
    critic_momentum: Unit = 0.9
    critic_weight_decay: NonNegative = 0.0002
    imt_steps: Count = 1
    imt_step: Positive = 1.0
    """Share of the radius that each IMT step moves."""
    imt_rule: Literal["interval", "threshold"] = "interval"
    """When the limited form takes half a step: while the score is inside `imt_band`, as in the paper's experiments
    and the code, or while the chance of "adversarial" is below `imt_threshold`, as in the section on the method."""
    imt_band: tuple[Unit, Unit] = (0.3, 0.7)
    imt_threshold: Unit = 0.5

    def modules(self, task: Task) -> dict[str, nn.Module]:
        if task.threat.norm != "linf":
            raise UserError(f"defense atld moves along signs and needs an linf threat model, not {task.threat}")
        classifier = cast(Classifier, task.network())
        with torch.no_grad(), crafting(classifier):
            _, codes = read_codes(classifier, torch.zeros(1, *task.input_shape), self.latent)
        critic = build_critic(
            tuple(codes.shape[1:]), task.num_classes, latent=self.latent, form=self.critic_form,
            depth=self.critic_depth, width=self.critic_width,
        )  # fmt: skip
        return {"classifier": classifier, "critic": critic}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for f; plain SGD at a constant rate for D."""
        own = list(modules["critic"].parameters())
        optimizer = torch.optim.SGD(
            own, lr=self.critic_lr, momentum=self.critic_momentum, weight_decay=self.critic_weight_decay
        )
        return {"classifier": task.player(modules["classifier"].parameters()), "critic": Player(own, optimizer)}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        f, critic = cast(Classifier, ctx.modules["classifier"]), cast(Critic, ctx.modules["critic"])
        ascent = self.ascent(ctx.threat, ctx.fraction)
        if len(x) == 1:
            raise UserError("atld's critic normalises over the batch and met a batch of one image: set drop_last")

        with torch.no_grad(), crafting(f, bn=self.bn_mode_attack), ctx.autocast():
            clean_logits, clean_codes = (out.float() for out in read_codes(f, x, self.latent))
        targets = smoothed(y, clean_logits.shape[1], self.smoothing)

        def adversity(at: Tensor) -> Tensor:
            # D's value on the clean codes is constant in x_adv: only its running statistics can tell it was asked.
            if self.critic_meets_clean:
                with torch.no_grad():
                    critic(clean_codes)
            return -F.softplus(critic(read_codes(f, at, self.latent)[1])[0].float())

        start = ascent.start(x, ctx.rng, "uniform")
        with crafting(f, bn=self.bn_mode_attack), crafting(critic, bn="train_update"), ctx.autocast():
            x_adv = ascent(adversity, x, start)
        x_adv.requires_grad_()
        adversarial_codes: list[Tensor] = []

        def classifier_loss() -> Tensor:
            logits, codes = (out.float() for out in read_codes(f, x_adv, self.latent))
            adversarial_codes.append(codes.detach())
            entropy = F.cross_entropy(logits, targets)
            aligned = self._alignment(entropy, logits, clean_logits, codes, critic, x_adv)
            ctx.log(entropy=entropy, aligned=aligned)
            return entropy + aligned

        def critic_loss() -> Tensor:
            clean, clean_classes = (out.float() for out in critic(clean_codes))
            adversarial, adversarial_classes = (out.float() for out in critic(adversarial_codes[0]))
            apart = F.softplus(-clean).mean() + F.softplus(adversarial).mean()
            named = F.cross_entropy(clean_classes, targets) + F.cross_entropy(adversarial_classes, targets)
            ctx.log(critic_apart=apart, score_clean=clean.sigmoid().mean(), score_adv=adversarial.sigmoid().mean())
            return apart + named

        # The code updates D first; the losses share no parameter that either moves, so the order is free (with
        # "gan", f meets the D that its adversary met), and this one leaves f's forward pass inside its update.
        yield Update(("classifier",), classifier_loss)
        for _ in range(self.critic_updates):
            yield Update(("critic",), critic_loss)
        self.look_at_clean(ctx, x, y)

    def _alignment(
        self, entropy: Tensor, logits: Tensor, clean_logits: Tensor, codes: Tensor, critic: Critic, x_adv: Tensor
    ) -> Tensor:
        if self.align == "none":
            return entropy.new_zeros(())
        if self.align == "gan":
            with crafting(critic, bn="train"):
                return -F.softplus(critic(codes)[0].float()).mean()
        pairing = F.mse_loss(logits, clean_logits)
        return pairing_weight(entropy, pairing, x_adv) / self.pairing_divisor * pairing

    @property
    def halved(self) -> tuple[float, float]:
        """Scores of "clean" between which the limited form takes half a step, both ends left out."""
        return self.imt_band if self.imt_rule == "interval" else (1 - self.imt_threshold, BEYOND)

    def system(
        self, modules: dict[str, nn.Module], mode: str, *, input_shape: Shape, num_classes: int, threat: ThreatModel
    ) -> System:
        self.require_mode(mode)
        classifier = cast(Classifier, modules["classifier"])
        purification = IMT(
            classifier, cast(Critic, modules["critic"]), radius=threat.radius,
            rule="full" if mode == "imt" else "interval", band=self.halved, steps=self.imt_steps,
            step=self.imt_step, latent=self.latent,
        )  # fmt: skip
        return TorchSystem(
            classifier, input_shape=input_shape, num_classes=num_classes, name=mode,
            purification=None if mode == "off" else purification,
        )  # fmt: skip


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """N x classes targets: 1 - smoothing for the label, smoothing / (classes - 1) for every other class."""
    others = torch.full((len(labels), classes), smoothing / (classes - 1), device=labels.device)
    return others.scatter(1, labels[:, None], 1 - smoothing)


def pairing_weight(entropy: Tensor, pairing: Tensor, x_adv: Tensor) -> Tensor:
    """s = max(d entropy / d x_adv) / max(d pairing / d x_adv), signed maxima over the batch, as a constant.

    Clamped to [0, 1e4], and 0 where the denominator is at most 1e-12: the published code can reach a negative or
    infinite weight.
    """
    (top,) = torch.autograd.grad(entropy, x_adv, retain_graph=True)
    (bottom,) = torch.autograd.grad(pairing, x_adv, retain_graph=True)
    ratio = (top.max() / bottom.max().clamp_min(SMALLEST)).clamp(0, LARGEST)
    return torch.where(bottom.max() > SMALLEST, ratio, torch.zeros_like(ratio))
