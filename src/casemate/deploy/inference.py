"""What is exported: the whole inference of a system as a module without autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from casemate.deploy.decompositions import ConvMode
from casemate.deploy.ensemble import Ensemble, Noise
from casemate.deploy.fold import forward_graph
from casemate.deploy.gradient_graph import gradient_graph
from casemate.deploy.metadata import Layout
from casemate.deploy.pooling import PoolMode
from casemate.purification.imt import IMT


class Front(nn.Module):
    """Images as they arrive -> N x C x H x W floats in [0, 1]."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, image: Tensor) -> Tensor:
        if self.layout == "float32-nchw":
            return image
        return (image.permute(0, 3, 1, 2).float() / 255).contiguous()


class PlainInference(nn.Module):
    """image -> (logits N x classes, probabilities N x classes)."""

    outputs = values = ("logits", "probabilities")

    def __init__(self, classifier: nn.Module, sample: Tensor, layout: Layout) -> None:
        super().__init__()
        self.front, self.classifier = Front(layout), forward_graph(classifier, sample)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.classifier(self.front(image))
        return logits, logits.softmax(-1)


class EnsembleInference(nn.Module):
    """image -> (logits N x classes, probabilities N x classes) of the mean softmax over draws of noise."""

    outputs = values = ("logits", "probabilities")

    def __init__(self, ensemble: Ensemble, sample: Tensor, layout: Layout, noise: Noise) -> None:
        super().__init__()
        self.front = Front(layout)
        # the tracing takes equal calls for one, and each draw of noise is one of its own
        self.ensemble = forward_graph(ensemble, sample) if noise == "seeded" else ensemble

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.ensemble(self.front(image))
        return logits, logits.softmax(-1)


class DetectorInference(nn.Module):
    """image -> (logits, probabilities, detector (N,)): log odds of "adversarial" less the threshold, so that an image
    is to be rejected where `detector` is above 0."""

    outputs = values = ("logits", "probabilities", "detector")

    def __init__(self, readout: nn.Module, sample: Tensor, layout: Layout) -> None:
        super().__init__()
        self.front, self.readout = Front(layout), forward_graph(readout, sample)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        odds, logits = self.readout(self.front(image))
        return logits, logits.softmax(-1), odds


class ImtInference(nn.Module):
    """image -> (logits, probabilities, manifold_score (N,) in [0, 1], purified N x C x H x W in [0, 1], the
    critic's gradient at the image N x C x H x W).

    Logits and probabilities are those of the purified image, the score is that of the image as it came. The gradient
    comes from `gradient_graph`, whose forward pass gives the score as well. `values` names what forward gives, and
    `outputs` those that are served; the others are for the parity report.
    """

    values = ("logits", "probabilities", "manifold_score", "purified", "gradient")

    def __init__(
        self, imt: IMT, sample: Tensor, layout: Layout, *, purified: bool, conv: ConvMode, pool: PoolMode
    ) -> None:
        super().__init__()
        self.outputs = self.values[: 4 if purified else 3]
        self.imt = imt
        self.front = Front(layout)
        readout = forward_graph(lambda x: imt.readout(x)[0], sample)
        self.ascent = gradient_graph(readout, lambda z: z, sample, conv=conv, pool=pool)
        self.classifier = forward_graph(imt.classifier, sample)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.front(image)
        first, z, _ = self.ascent(x)
        reach = self._reach(z)
        at = self._move(x, first, x, reach)
        for _ in range(self.imt.steps - 1):
            gradient, _, _ = self.ascent(at)
            at = self._move(at, gradient, x, reach)
        logits = self.classifier(at)
        return logits, logits.softmax(-1), z.sigmoid(), at, first

    def _reach(self, z: Tensor) -> Tensor:
        if self.imt.rule == "full":  # a constant, not one number per image
            return torch.tensor(self.imt.radius, dtype=z.dtype)
        return (self.imt.radius * self.imt.strength(z)).view(-1, 1, 1, 1)

    def _move(self, at: Tensor, gradient: Tensor, x: Tensor, reach: Tensor) -> Tensor:
        if self.imt.steps == 1 and self.imt.step <= 1:  # one step cannot leave the ball
            return (at + self.imt.step * reach * gradient.sign()).clamp(0, 1)
        return self.imt.move(at, gradient, x, reach)
