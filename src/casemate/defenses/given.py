"""A network as it came, with the weights that its options name: nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from casemate.defenses.base import Defense
from casemate.fields import spec
from casemate.trainable import Context, Update


@spec
class Given(Defense):
    """No update at all. For classifiers that somebody else trained, attacked beside one's own: give the row a network
    with `weights`, and one epoch, which only measures."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield from ()
