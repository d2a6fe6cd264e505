"""Random self-ensemble (Liu et al. 2018): noise at every convolution, in training and ever after.

There is no adversary. One set of weights is an ensemble of as many networks as one draws noise for, and the answer is
the mean of their softmax. An attack that does not average its gradients over the noise overestimates this defense.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.fields import Count, NonNegative, spec
from casemate.networks.base import Classifier, Shape
from casemate.randomised import GaussianNoise, RandomisedSystem
from casemate.system import System
from casemate.threat import ThreatModel
from casemate.trainable import Context, Task, Update


@spec
class RSE(Defense):
    """Minimise CE(f(x; noise), y), fresh noise for every image and layer. One forward and one backward pass.

    Inference is `RandomisedSystem`: the mean softmax of `ensemble` draws, judged by the majority of `votes` such
    answers (one is the paper's single answer), and attacked through the mean over `draws` of them.
    """

    inference_modes: ClassVar[tuple[str, ...]] = ("ensemble",)

    sigma_input: NonNegative = 0.2
    """Standard deviation of the noise on the image, in pixel units: it comes before any normalisation."""
    sigma_inner: NonNegative = 0.1
    """The same inside the network, in units of the activations."""
    position: Literal["before", "after"] = "before"
    """The inner noise: in front of every convolution but the first, whose noise is the image's, as in the authors'
    final code; or behind every convolution (with 0.8 and 0.4, the MNIST network that the ER-Classifier's authors
    compare with)."""
    ensemble: Count = 10
    draws: Count = 20
    votes: Count = 1

    def modules(self, task: Task) -> dict[str, nn.Module]:
        classifier = cast(Classifier, task.network())
        self.add_noise(classifier)
        return {"classifier": classifier}

    def add_noise(self, classifier: Classifier) -> None:
        """Put the noise layers into a network, in place."""
        convolutions = [
            (parent, name, child)
            for parent in classifier.body.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.Conv2d)
        ]
        first = next((child for child in classifier.body.modules() if isinstance(child, nn.Conv2d)), None)
        for parent, name, convolution in convolutions:
            if self.position == "after":
                setattr(parent, name, nn.Sequential(convolution, GaussianNoise(self.sigma_inner)))
            elif convolution is not first:
                setattr(parent, name, nn.Sequential(GaussianNoise(self.sigma_inner), convolution))
        classifier.normalise = nn.Sequential(GaussianNoise(self.sigma_input), classifier.normalise)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x).float(), y))

    def system(
        self, modules: dict[str, nn.Module], mode: str, *, input_shape: Shape, num_classes: int, threat: ThreatModel
    ) -> System:
        self.require_mode(mode)
        return RandomisedSystem(
            modules["classifier"], input_shape=input_shape, num_classes=num_classes, ensemble=self.ensemble,
            draws=self.draws, votes=self.votes, name=mode,
        )  # fmt: skip
