"""What ER-Classifier and its relatives share: an encoder Q and a small classifier C of its codes, trained together.

Q is everything of the recipe's network up to `features`, C its `head`: any network will do, and those of the paper
are `er_conv` and `er_vgg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.defenses.base import Defense
from casemate.defenses.crafting import crafting
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.networks.base import Classifier
from casemate.networks.encoders import CodeCritic, encoder_parameters
from casemate.trainable import Context, Player, Task, Update


@spec
class EncoderAndHead(Defense):
    """Two players with the recipe's optimizer, Q at its learning rate and C at a share of it."""

    head_lr_scale: Positive = 0.05
    """Learning rate of C over that of Q."""

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        classifier = cast(Classifier, modules["classifier"])
        return {
            "encoder": task.player(encoder_parameters(classifier)),
            "head": task.player(classifier.head.parameters(), lr_scale=self.head_lr_scale),
        }


@spec
class MatchedPrior(EncoderAndHead):
    """Q's codes are drawn towards N(0, I) by a critic D with clipped weights (Wasserstein distance W1).

    Signs are those of the authors' code: D descends mean D(prior) - mean D(codes), Q descends + mean D(codes).
    """

    regulariser: NonNegative = 0.0005
    """Weight of the critic's term in Q's loss: 0.0005 on MNIST, 0.1 on CIFAR-10, STL10 and larger."""
    critic_output: Literal["logsigmoid", "linear"] = "logsigmoid"
    """D's last layer: a log-sigmoid as in the authors' code, or nothing, as in a Wasserstein GAN."""
    critic_width: Count = 512
    critic_lr_scale: Positive = 0.5
    """Learning rate of D over that of Q."""
    critic_clip: Positive = 0.01
    """Every parameter of D is cut to [-critic_clip, critic_clip] after each of its steps."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        classifier = cast(Classifier, task.network())
        with torch.no_grad(), crafting(classifier):
            code = classifier.features(torch.zeros(1, *task.input_shape)).shape[1]
        critic = CodeCritic(code, width=self.critic_width, output=self.critic_output)
        return {"classifier": classifier, "critic": critic}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        own = list(modules["critic"].parameters())

        @torch.no_grad()
        def clip() -> None:
            for parameter in own:
                parameter.clamp_(-self.critic_clip, self.critic_clip)

        critic = task.player(own, lr_scale=self.critic_lr_scale, after_step=clip)
        return {**super().players(task, modules), "critic": critic}

    def matched(
        self, ctx: Context, images: Sequence[Tensor], entropy: Callable[[list[Tensor]], Tensor], *,
        separate: bool = False,
    ) -> Iterator[Update]:  # fmt: skip
        """D on the codes of all `images`, then Q and C on entropy(codes) + regulariser x mean D(codes); or, with
        `separate`, Q and C on the first, and Q on the second in a step of its own, which encodes anew.

        Each batch of images goes through Q once, apart from the others: D's update makes the codes, and their graph
        is kept for the update of Q and C, which follows before Q has changed. With perturbed weights that graph would
        be of no use: then D's codes are made aside, and Q and C make theirs.
        """
        classifier, critic = cast(Classifier, ctx.modules["classifier"]), ctx.modules["critic"]
        require_batch(classifier, images[0])
        prior = normal(ctx, sum(map(len, images)), ctx.modules["critic"])
        kept: list[Tensor] = []

        def encoded() -> list[Tensor]:
            return [classifier.features(batch).float() for batch in images]

        def critic_loss() -> Tensor:
            if not ctx.perturbed:
                kept.extend(encoded())
                return apart(ctx, critic, prior, torch.cat(kept).detach())
            with torch.no_grad(), crafting(classifier, bn="train"):
                codes = torch.cat(encoded())
            return apart(ctx, critic, prior, codes)

        def named(codes: list[Tensor]) -> Tensor:
            value = entropy(codes)
            ctx.log(entropy=value)
            return value

        def aligned(codes: list[Tensor]) -> Tensor:
            value: Tensor = critic(torch.cat(codes)).float().mean()
            ctx.log(aligned=value)
            return self.regulariser * value

        def joint_loss() -> Tensor:
            codes = kept or encoded()
            return named(codes) + aligned(codes)

        yield Update(("critic",), critic_loss)
        if separate:
            yield Update(("encoder", "head"), lambda: named(kept or encoded()))
            yield Update(("encoder",), lambda: aligned(encoded()))
        else:
            yield Update(("encoder", "head"), joint_loss)


def apart(ctx: Context, critic: nn.Module, prior: Tensor, codes: Tensor) -> Tensor:
    """D's loss: mean D(prior) - mean D(codes), minus D's estimate of the distance between the two."""
    loss: Tensor = critic(prior).float().mean() - critic(codes).float().mean()
    ctx.log(critic_gap=-loss)
    return loss


def normal(ctx: Context, n: int, critic: nn.Module) -> Tensor:
    """`n` codes of the prior N(0, I), n x k, where `critic` is."""
    like = next(critic.parameters())
    return torch.randn(n, like.shape[1], generator=ctx.rng).to(like)


def require_batch(classifier: nn.Module, x: Tensor) -> None:
    """Raise UserError for a batch of one image where BatchNorm is to normalise over it."""
    if len(x) == 1 and any(isinstance(part, _BatchNorm) and part.training for part in classifier.modules()):
        raise UserError("the network normalises over the batch and met a batch of one image: set drop_last")
