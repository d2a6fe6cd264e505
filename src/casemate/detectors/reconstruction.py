"""Defense-GAN's detector (Samangouei et al. 2018): how far an image is from what a generator can make of it.

The generator is that of a row trained by `defense_gan`; a detector stands behind another row, a plain classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from casemate.detectors.fitting import DetectorSpec, Scorer
from casemate.errors import UserError
from casemate.fields import Count, Positive, Text, Unit, spec
from casemate.networks.base import Classifier, Shape
from casemate.networks.gan import FIRST, ImageGenerator
from casemate.networks.pretrained import read_tensors
from casemate.purification.projection import Descent
from casemate.seeding import generator
from casemate.system import frozen

Slope = Literal["fixed_code", "unrolled"]
OWN = "generator/"
"""What the generator's tensors begin with in the file of a trained row."""


class ReconstructionError(Scorer):
    """min_z of the mean of (G(z) - x)^2 over pixels, by `descent` from `starts` (restarts x latent).

    The starts are drawn once, where the authors' are drawn anew for every batch: so the score is a function of the
    image, and an attacker knows all of it. `side` is the images' height and width.
    """

    exportable = False

    starts: Tensor
    side: Tensor

    def __init__(self, made: ImageGenerator, descent: Descent, slope: Slope, starts: Tensor, side: Tensor) -> None:
        super().__init__()
        self.generator, self.descent, self.slope = made, descent, slope
        self.register_buffer("starts", starts)
        self.register_buffer("side", side)

    def forward(self, classifier: Classifier, x: Tensor, originals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, start = classifier(x), self.starts.expand(len(x), -1, -1)
        if self.slope == "unrolled" and torch.is_grad_enabled() and x.requires_grad:
            made, _ = self.descent(self.generator, x, start, differentiable=True)
        else:
            with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
                made = self.descent(self.generator, x.detach().clone(), start)[0].detach()
        return (made - x).square().flatten(1).mean(1, keepdim=True), logits


@spec
class Reconstruction(DetectorSpec):
    """The squared distance of an image to the nearest image that a generator makes of a code, found by descent.

    Each look costs restarts x steps passes of the generator, forward and backward; a joint attack takes one at every
    step. Fewer of both make a weaker detector, and a quicker one. It is a search, and has no form as ONNX.
    """

    weights: Text
    """The weights.safetensors of a row trained by `defense_gan` on the same images."""
    sha256: Text
    """Of that file, as its card.json says: another training of that row is another detector."""
    steps: Count = 200
    restarts: Count = 10
    rate: Positive = 10.0
    momentum: Unit = 0.7
    """The descent: settings of the authors' code."""
    slope: Literal["fixed_code", "unrolled"] = "fixed_code"
    """How an attacker differentiates the score: with the code that was found held fixed, which is exact where the
    descent has arrived; or through every step, exact everywhere, for the memory of all of them."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64:
            raise UserError(f"Reconstruction: sha256 has 64 digits, not {len(self.sha256)}")

    def scorer(self, classifier: Classifier, x: Tensor, y: Tensor, seed: int = 0) -> ReconstructionError:
        path = Path(self.weights)
        if not path.is_file():
            raise UserError(f"Reconstruction: {path} does not exist: train a row with the method defense_gan first")
        tensors = {k.removeprefix(OWN): v for k, v in read_tensors(path, self.sha256).items() if k.startswith(OWN)}
        made = self._generator(tensors, classifier.input_shape)
        draw = torch.randn(self.restarts, made.latent, generator=generator("reconstruction", seed))
        starts = draw / made.latent**0.5
        side = torch.tensor(classifier.input_shape[1])
        return ReconstructionError(made, self._descent(), self.slope, starts, side).to(x.device)

    def restore(self, tensors: dict[str, Tensor]) -> ReconstructionError:
        own = {k.removeprefix("generator."): v for k, v in tensors.items() if k.startswith("generator.")}
        channels, side = own["deconv3.weight"].shape[1], int(tensors["side"])
        made = self._generator(own, (channels, side, side))
        return ReconstructionError(made, self._descent(), self.slope, tensors["starts"], tensors["side"])

    def _descent(self) -> Descent:
        return Descent(self.steps, self.restarts, self.rate, self.momentum)

    def _generator(self, tensors: Mapping[str, Tensor], shape: Shape) -> ImageGenerator:
        """The generator with those tensors, frozen. Raises UserError where they are not of one for such images."""
        try:
            rows, latent = tensors["linear.weight"].shape
            with torch.device("meta"):
                made = ImageGenerator(shape, latent=latent, width=rows // (4 * FIRST * FIRST))
            made.load_state_dict(dict(tensors), assign=True)
        except (KeyError, ValueError, RuntimeError):
            shown = "x".join(map(str, shape))
            raise UserError(f"Reconstruction: {self.weights} holds no generator of {shown} images") from None
        return made.eval().requires_grad_(False)
