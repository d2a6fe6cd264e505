"""Several systems as one: what a transfer attack crafts on when no single source is close to the victim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from casemate.errors import UserError
from casemate.system import ANSWERS, System, View


class Ensemble(System):
    """Answers with the mean of its members' probabilities (Liu et al. 2017, eq. 4, with equal weights).

    `logits` are the log of that mean, N x C. Each member answers as it is deployed, and is differentiated through
    its own view "adaptive". Raises UserError for fewer than two members, for members of other images or classes, and
    for one that offers no gradient.
    """

    def __init__(self, members: Mapping[str, System]) -> None:
        self.name = " + ".join(members)
        self.members = tuple(members.values())
        if len(members) < 2:
            raise UserError(
                f"an ensemble needs two members or more, and {self.name or 'this one'} has {len(members)}"
            )
        first = self.members[0]
        for name, member in members.items():
            if (member.input_shape, member.num_classes) != (first.input_shape, first.num_classes):
                raise UserError(
                    f"ensemble {self.name}: {name} takes other images or has other classes than the first"
                )
            if "gradient" not in member.offers:
                raise UserError(f"ensemble {self.name}: {name} offers no gradient")
        self.input_shape, self.num_classes, self.offers = first.input_shape, first.num_classes, ANSWERS
        self.stochastic = any(member.stochastic for member in self.members)

    def logits(self, x: Tensor) -> Tensor:
        return _mean([member.logits for member in self.members], x)

    def views(self) -> dict[str, View]:
        faces = [member.views()["adaptive"] for member in self.members]
        passes = sum(face.passes[0] for face in faces), sum(face.passes[1] for face in faces)
        exact = all(face.exact for face in faces)
        logits = partial(_mean, [face.logits for face in faces])
        return {
            name: View(name, logits, exact, self.offers, passes, system=self) for name in ("static", "adaptive")
        }  # fmt: skip

    def decision_passes(self) -> tuple[int, int]:
        each = [member.decision_passes() for member in self.members]
        return sum(forwards for forwards, _ in each), sum(backwards for _, backwards in each)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.frozen())
            yield

    def hash(self) -> str:
        return hashlib.sha256(" ".join(member.hash() for member in self.members).encode()).hexdigest()[:16]


def _mean(answers: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    each = torch.stack([answer(x).log_softmax(1) for answer in answers])
    return each.logsumexp(0) - math.log(len(answers))
