"""VAE-CLA (Li et al.): classification of the code of a variational encoder, the other way to a Gaussian embedding.

The paper says only that it balances a divergence and the classification, so the rest is read from that: Q answers
a mean m and a log variance, C classifies m + sqrt(v) r in training and m at inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.embedding import EncoderAndHead, require_batch
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, spec
from casemate.networks.base import Classifier
from casemate.networks.gan import ImageGenerator
from casemate.trainable import Context, Player, Task, Update


@spec
class VAECLA(EncoderAndHead):
    """Minimise CE(C(z), y) + regulariser x KL(N(m, v) || N(0, I)), z ~ N(m, v): one pass and one weight gradient.

    The divergence is summed over the code and averaged over the batch. Needs a network whose last layer is linear.
    """

    regulariser: NonNegative = 0.0005
    """ER's weight of the same data set: 0.0005 on MNIST, 0.1 on CIFAR-10 and larger."""
    decoder: Flag = False
    """Also ask that images can be had back from z: a whole variational autoencoder."""
    reconstruction: NonNegative = 1.0
    """Weight of the decoder's squared error, a mean over pixels."""
    decoder_width: Count = 64

    def modules(self, task: Task) -> dict[str, nn.Module]:
        """The classifier, whose code is m; "log_variance", which reads what the code is made of; "decoder"."""
        classifier = cast(Classifier, task.network())
        mean = classifier.body[classifier.layers[-1]]
        if not isinstance(mean, nn.Linear):
            raise UserError("vae_cla needs a network whose code is the output of a linear layer: er_conv or er_vgg")
        made: dict[str, nn.Module] = {
            "classifier": classifier,
            "log_variance": nn.Linear(mean.in_features, mean.out_features),
        }
        if self.decoder:
            made["decoder"] = ImageGenerator(task.input_shape, latent=mean.out_features, width=self.decoder_width)
        return made

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """Q's log variance and the decoder move at Q's learning rate."""
        made = super().players(task, modules)
        further = {name: task.player(modules[name].parameters()) for name in modules if name != "classifier"}
        return {**made, **further}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = cast(Classifier, ctx.modules["classifier"])
        require_batch(classifier, x)
        trunk, _ = classifier.split(classifier.layers[-2])
        mean_of, log_variance_of = (
            classifier.body[classifier.layers[-1]],
            cast(nn.Linear, ctx.modules["log_variance"]),
        )
        noise = torch.randn(len(x), log_variance_of.out_features, generator=ctx.rng).to(x.device)

        def loss() -> Tensor:
            hidden = trunk(x)
            mean, log_variance = mean_of(hidden).float(), log_variance_of(hidden).float()
            z = mean + (log_variance / 2).exp() * noise
            entropy, apart = F.cross_entropy(classifier.head(z).float(), y), gaussian_divergence(mean, log_variance)
            ctx.log(entropy=entropy, divergence=apart.mean())
            total = entropy + self.regulariser * apart.mean()
            if self.decoder:
                error = F.mse_loss(ctx.modules["decoder"](z).float(), x)
                ctx.log(error=error)
                total = total + self.reconstruction * error
            return total

        yield Update(("encoder", "head", *(name for name in ctx.modules if name != "classifier")), loss)


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, v) || N(0, I)) per sample (N,), from N x k means and log variances."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
