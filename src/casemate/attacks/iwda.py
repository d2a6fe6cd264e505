"""IWDA ("Internal Wasserstein Distance for Adversarial Attack and Defense", Algorithm 1): a picture made anew from
its own patches so that the classifier errs. One SinGAN pyramid per picture, its generators pulled off the label.

No lp ball holds these images: the distance over patches is what the critics keep small; `radius` makes it a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.internal import IWDBudget, charge, check_pictures, nearest_success, standing
from casemate.attacks.pyramid import (
    Pictures,
    classification_loss,
    critic_loss,
    picture_rngs,
    picture_seeds,
    side_scores,
    values,
)
from casemate.errors import UserError
from casemate.fields import Count, Flag, Natural, NonNegative, Positive, Unit, spec
from casemate.networks.patch_pyramid import LARGEST_PYRAMID, Size, pyramid_sizes, resized, size_of
from casemate.networks.singan import PATCH, PatchCritic
from casemate.system import View
from casemate.threat import Goal, ThreatModel

log = logging.getLogger(__name__)

QUICK: dict[str, Any] = {
    "largest": 128, "scales": 5, "steps": 100, "critic_steps": 1, "generator_steps": 1, "adversarial_scales": 2,
    "widest": 32,
}  # fmt: skip
"""Options for a look on a processor: pictures of 128 pixels, a few minutes each. The defaults are the paper's where
it gives them and SinGAN's where not: hours for a picture of 224 pixels."""

DECAY, DECAY_AT = 0.1, 0.8
"""The learning rate is multiplied once, at this share of a scale's steps (SinGAN)."""


@spec
class IWDA(Attack):
    """Algorithm 1 with its two slips mended (see `pyramid.critic_loss`; the critic's loop runs `critic_steps` times).

    Coarse to fine, at each scale: critics by the difference of their values and a gradient penalty; generators by
    minus the critic's value + `reconstruction` * MSE of the picture made anew + `tau` * L_c, the classifier seeing
    the sample scaled up. Then `samples` draws are judged, and the success nearest to the picture is kept. Judge it by
    what it cost the image too: an attack this free can destroy what was to be seen.
    """

    tau: NonNegative = 0.1
    """Weight of the classification loss; 0 shows what SinGAN's samples alone fool."""
    objective: Literal["ce", "margin"] = "ce"
    """The paper's cross-entropy has hardly a slope where the classifier is sure, so that `reconstruction` wins; the
    margin has."""
    cap: NonNegative | None = 5.0
    """The classification loss pays no further; None in the paper."""
    reconstruction: NonNegative = 10.0
    """SinGAN's; the paper's loss has no such term (0)."""
    penalty: NonNegative = 0.1
    """Weight of the gradient penalty."""
    penalty_norm: Literal["pixel", "image"] = "pixel"
    """SinGAN's norm at each pixel, or the formula's one norm over the image, for which 10 is the usual weight."""
    critic_norm: Flag = False
    """BatchNorm in the critic, as SinGAN; it mixes what the penalty should keep apart."""
    steps: Count = 2000
    """Iterations per scale."""
    critic_steps: Count = 3
    """Of the critic in an iteration."""
    generator_steps: Count = 3
    rate: Positive = 5e-4
    """Of both Adams; a tenth of it in the last fifth of a scale."""
    beta: Unit = 0.5
    """First beta of both Adams; the second is 0.999."""
    coarsest: Count = 25
    """Shorter side of the coarsest scale; 12 suits pictures of 28 and 32 pixels."""
    largest: Count = 250
    """Longer side of the finest scale. A larger picture is made at this size and scaled up, without its detail."""
    scales: Count | None = None
    """In all; by default so many that each is about 3/4 of the next."""
    start: Natural = 0
    """The first scale that is made anew. Below lies the picture itself: the later, the nearer the result."""
    adversarial_scales: Count | None = None
    """Scales, counted from the finest, that see the classifier; by default all."""
    narrowest: Count = 32
    """Filters at the coarsest scale, doubled every four."""
    widest: Count = 128
    samples: Count = 10
    """Draws that are judged; 1 for the success rate at one draw."""
    radius: Positive | None = None
    """Hard limit of the exact IWD: a draw beyond is brought back along the line to the picture. None for no limit."""
    at_once: Count = 8
    """Pictures trained side by side; bounds the memory."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        check_pictures("iwda", x, goal, PATCH)
        if self.start >= (made := len(self.sizes(*size_of(x)))):
            raise UserError(f"iwda: start must be below {made}, the number of scales, and is {self.start}")
        out = x.clone()
        for rows in torch.split(standing(view, x, goal, cost), self.at_once):
            if len(rows):
                spent = Cost.zero(len(rows))
                out[rows] = Resynthesis(self, view, x[rows], goal[rows], seed, rows.tolist(), spent).run()
                charge(cost, rows, spent)
        return self.budget(threat).shown(out, x)

    def sizes(self, height: int, width: int) -> list[Size]:
        """(height, width) of every scale for pictures of a size, coarsest first."""
        return pyramid_sizes(height, width, self.scales, coarsest=self.coarsest, largest=self.largest)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        scales = LARGEST_PYRAMID if view.system is None else len(self.sizes(*view.system.input_shape[1:]))
        seeing = min(scales - self.start, self.adversarial_scales or scales) if self.tau else 0
        steps = n * seeing * self.steps * self.generator_steps
        return steps * view.passes[0], steps * view.passes[1], n * (self.samples + 1)

    def budget(self, threat: ThreatModel) -> IWDBudget:
        return IWDBudget(self.radius)


@dataclass
class Resynthesis:
    """One run on B pictures that stand; `rows` are their positions in the chunk."""

    attack: IWDA
    view: View
    x: Tensor
    goal: Goal
    seed: int
    rows: list[int]
    cost: Cost

    def run(self) -> Tensor:
        """Adversarial images, B x C x H x W in [0, 1]."""
        attack, all_sizes = self.attack, self.attack.sizes(*size_of(self.x))
        levels = [resized(self.x, size) * 2 - 1 for size in all_sizes]
        self.pictures = Pictures(levels, attack.start, picture_rngs(self.seed, self.rows))
        critic: PatchCritic | None = None
        for scale in range(attack.start, len(levels)):
            critic = self.pictures.grow(
                scale, critic, attack.narrowest, attack.widest, picture_seeds(self.seed, self.rows, scale),
                norm=attack.critic_norm, by_reconstruction=attack.reconstruction > 0,
            )  # fmt: skip
            fooled = self._fit(scale, critic)
            log.info("iwda: scale %d of %d, %d x %d pixels, fooled %s of %d", scale + 1, len(levels),
                     *all_sizes[scale], "?" if fooled is None else int(fooled.sum()), len(self.x))  # fmt: skip
        budget = IWDBudget(attack.radius)
        return nearest_success(self.view, self.x, self.goal, self._samples(), budget, self.cost)

    def _samples(self) -> Iterator[Tensor]:
        for _ in range(self.attack.samples):
            with torch.no_grad():
                sample = self.shown(self.pictures.image(len(self.pictures.levels) - 1))
            yield sample

    def shown(self, made: Tensor) -> Tensor:
        """What the classifier sees of images at any scale: at its own size, in [0, 1]."""
        return ((resized(made, size_of(self.x)) + 1) / 2).clamp(0, 1)

    def _fit(self, scale: int, critic: PatchCritic) -> Tensor | None:
        """Train one scale; whether its last adversarial sample fooled each picture, where the scale sees that."""
        attack, pictures, generator = self.attack, self.pictures, self.pictures.generators[-1]
        real, scores, fooled = pictures.levels[scale], side_scores(critic), None
        with torch.no_grad():
            rebuilt_from = pictures.before(scale, fixed=True)
        fixed = pictures.fixed_noise(scale)
        by_critic, by_generator = (
            torch.optim.Adam(net.parameters(), attack.rate, betas=(attack.beta, 0.999)) for net in (critic, generator)
        )
        for step in range(attack.steps):
            if step == round(DECAY_AT * attack.steps):
                for group in (*by_critic.param_groups, *by_generator.param_groups):
                    group["lr"] *= DECAY
            for _ in range(attack.critic_steps):
                with torch.no_grad():
                    noise, previous = pictures.noise(scale), pictures.before(scale)
                    fake = pictures.write(scale, noise, previous)
                rho = pictures.draw((), uniform=True)
                loss = critic_loss(scores, real, fake, rho, weight=attack.penalty, norm=attack.penalty_norm)
                _descend(by_critic, critic, loss)
            for _ in range(attack.generator_steps):
                fake = pictures.write(scale, noise, previous)
                loss = -values(scores, fake)
                if attack.reconstruction:
                    rebuilt = pictures.write(scale, fixed, rebuilt_from)
                    loss = loss + attack.reconstruction * (rebuilt - real).square().mean((1, 2, 3))
                if self._sees_classifier(scale):
                    adversarial, fooled = self._adversarial(fake)
                    loss = loss + attack.tau * adversarial
                _descend(by_generator, generator, loss)
        return fooled

    def _sees_classifier(self, scale: int) -> bool:
        seeing = self.attack.adversarial_scales
        return self.attack.tau > 0 and (seeing is None or scale >= len(self.pictures.levels) - seeing)

    def _adversarial(self, fake: Tensor) -> tuple[Tensor, Tensor]:
        """(L_c of each picture, whether the classifier is fooled)."""
        logits = self.view.logits(self.shown(fake)).float()
        self.cost.forwards += self.view.passes[0]
        self.cost.backwards += self.view.passes[1]
        loss = classification_loss(logits, self.goal, self.attack.objective, self.attack.cap)
        return loss, self.goal.reached(logits.detach().argmax(1))


def _descend(optimizer: torch.optim.Optimizer, network: nn.Module, losses: Tensor) -> None:
    """One step on the sum over pictures, which share no weight."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(losses.sum(), inputs=list(network.parameters()))
    optimizer.step()
