"""L2L*: L2L as L2L-DA (Jang et al. 2019) re-implements it for its tables; `l2l` is the method itself."""

from __future__ import annotations

from typing import Literal

from casemate.defenses.l2l_da import L2LDA
from casemate.fields import Count, Flag, Natural, NonNegative, Positive, spec


@spec
class L2LStar(L2LDA):
    """L2L-DA with everything that makes it L2L-DA switched off: one step of the whole radius, raw gradients, no
    noise, no label, no perturbation in the input, no diversity.

    A weak baseline by design: 0.02% (MNIST) and 0.00% (CIFAR-10) in the worst case of the paper, where gradients that
    are not normalised leave the generator blind to them.
    """

    steps: Count = 1
    step_factor: Positive = 1.0
    z_dim: Natural = 0
    condition: Flag = False
    feed_delta: Flag = False
    gradient_norm: Literal["rms", "channel", "image", "none"] = "none"
    diversity: NonNegative = 0.0
