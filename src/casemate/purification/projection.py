"""Defense-GAN's inference (Samangouei et al. 2018): classify what a generator makes of the image's nearest code.

z* = argmin_z ||G(z) - x||^2 by gradient descent from several random starts. They are drawn anew for every answer, so
the system is random, and is a `RandomisedSystem`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from casemate.networks.gan import ImageGenerator
from casemate.randomised import GaussianNoise, RandomisedSystem
from casemate.system import Purification, View, frozen

Backward = Literal["identity", "unrolled"]


@dataclass(frozen=True)
class Descent:
    """The search for z: settings of the authors' code."""

    steps: int = 200
    restarts: int = 10
    rate: float = 10.0
    """For the mean squared error over pixels; a tenth of it over the last fifth of the steps."""
    momentum: float = 0.7

    def __call__(
        self, generator: nn.Module, x: Tensor, start: Tensor, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(reconstructions N x C x H x W, mean squared errors (N,)) of the best restart of each image.

        `start` is N x restarts x latent. With `differentiable` the graph runs through all steps. The errors are those
        of the last codes; the authors' are one step behind theirs.
        """
        n, restarts = start.shape[:2]
        target = x.repeat_interleave(restarts, 0)
        z, velocity = start.flatten(0, 1), torch.zeros_like(start.flatten(0, 1))
        for step in range(self.steps):
            z = z if differentiable and z.requires_grad else z.detach().requires_grad_()
            error = _errors(generator(z), target)
            (slope,) = torch.autograd.grad(error.sum(), z, create_graph=differentiable)
            velocity = self.momentum * velocity + slope
            z = z - self.rate * (0.1 if step >= 0.8 * self.steps else 1.0) * velocity
        z = z if differentiable else z.detach()
        made = generator(z)
        errors = _errors(made, target).view(n, restarts)
        best = errors.argmin(1)
        return made.view(n, restarts, *x.shape[1:])[torch.arange(n), best], errors.gather(1, best[:, None])[:, 0]


class Projected(nn.Module):
    """f(G(z*)): a classifier behind the projection, as one randomised module.

    The random starts are the noise layer's, N(0, 1 / latent), the same for all images of a batch in each draw.
    Gradients pass as if the projection were x + constant ("identity", BPDA), or through every step ("unrolled").
    """

    def __init__(
        self, classifier: nn.Module, generator: ImageGenerator, descent: Descent, backward: Backward = "identity"
    ) -> None:
        super().__init__()
        self.classifier, self.generator = classifier, generator
        self.descent, self.backward = descent, backward
        self.noise = GaussianNoise(1 / math.sqrt(generator.latent))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(G(z*), its mean squared error to x (N,)), without gradients; of one draw within `drawn`."""
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            x = x.detach().clone()
            made, errors = self.descent(self.generator, x, self._start(x))
        return made.detach(), errors.detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.backward == "unrolled" and torch.is_grad_enabled() and x.requires_grad:
            made, _ = self.descent(self.generator, x, self._start(x), differentiable=True)
        else:
            made = self.reconstruct(x)[0] + (x - x.detach())
        out: Tensor = self.classifier(made)
        return out

    def _start(self, x: Tensor) -> Tensor:
        latent = self.generator.latent
        start: Tensor = self.noise(x.new_zeros(len(x), self.descent.restarts, latent))
        return start


class Projection(Purification):
    """One draw of the projection, for attacks that look into the defense: the generator is theirs, too."""

    passes = (0, 0)

    def __init__(self, inner: Projected) -> None:
        self.inner = inner

    @property
    def generator(self) -> ImageGenerator:
        """G."""
        return self.inner.generator

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner.reconstruct(x)[0]

    def score(self, x: Tensor) -> Tensor:
        """(N,) in (0, 1]: exp(-mean squared error of the reconstruction), the paper's sign of an attack."""
        return (-self.inner.reconstruct(x)[1]).exp()

    @property
    def spec(self) -> dict[str, Any]:
        return {"purification": "defense_gan", **asdict(self.inner.descent)}

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [self.inner.generator]

    def adaptive_attacks(self) -> dict[str, Any]:
        """The attack on the manifold itself, with a tenth of the published inversions and less."""
        from casemate.attacks.manifold import Manifold

        return {"manifold": Manifold(starts=5, inversion_steps=300, steps=1000)}


class DefenseGANSystem(RandomisedSystem):
    """A classifier behind the projection onto a generator's range.

    Views: "static", the classifier alone; "adaptive", the mean of identity-backward gradients over `draws` draws
    (BPDA with EOT); "unrolled", the gradient through the descent of one draw. Their descent is `attacked`, which may
    be cheaper than the deployed one. Passes are those of the classifier; each of them stands for restarts x steps
    passes of the generator.
    """

    def __init__(
        self, classifier: nn.Module, generator: ImageGenerator, descent: Descent, *,
        input_shape: tuple[int, int, int], num_classes: int, attacked: Descent | None = None, draws: int = 10,
        votes: int = 1, ensemble: int = 1, seed: int = 0, name: str = "defense_gan",
    ) -> None:  # fmt: skip
        deployed = Projected(classifier, generator, descent)
        super().__init__(
            deployed, input_shape=input_shape, num_classes=num_classes, ensemble=ensemble, draws=draws, votes=votes,
            seed=seed, name=name,
        )  # fmt: skip
        self.inner, self.attacked = classifier, attacked or descent
        self.purification: Projection = Projection(deployed)
        self.offers |= self.purification.offers

    def views(self) -> dict[str, View]:
        decisions = super().views()["adaptive"].decisions

        def face(name: str, backward: Backward, draws: int) -> View:
            searched = RandomisedSystem(
                Projected(self.inner, self.purification.generator, self.attacked, backward),
                input_shape=self.input_shape, num_classes=self.num_classes, draws=draws, seed=self.seed,
            )  # fmt: skip
            found = searched.views()["adaptive"]
            return replace(found, name=name, offers=self.offers, decisions=decisions, system=self)

        return {
            "static": View("static", self.inner, False, self.offers, decisions=decisions, system=self),
            "adaptive": face("adaptive", "identity", self.draws),
            "unrolled": face("unrolled", "unrolled", 1),
        }

    def adaptive_attacks(self) -> dict[str, Any]:
        return self.purification.adaptive_attacks()

    def hash(self) -> str:
        numbers = sorted({**self.purification.spec, "attacked": asdict(self.attacked)}.items())
        return hashlib.sha256(f"{super().hash()} {numbers}".encode()).hexdigest()[:16]


def _errors(made: Tensor, target: Tensor) -> Tensor:
    errors: Tensor = (made - target).square().flatten(1).mean(1)
    return errors
