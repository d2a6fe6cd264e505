"""What is heard while a system is attacked: answers that are no numbers, and the attack's own warnings.

The arg max of undefined logits is class 0, so a model that breaks looks like one that decides, and a search that
meets undefined losses gives up and leaves the image standing. An attack itself looks at the first answer only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from casemate.attacks.diagnostics import AttackWarning
from casemate.errors import UserError
from casemate.system import System

log = logging.getLogger(__name__)


@contextmanager
def all_finite(system: System, doing: str) -> Iterator[None]:
    """Raises UserError, once the work within has ended, if `system` answered a finite image with an infinite or
    undefined logit at any time. `doing` says what was done to it. Nothing is added to what the work computes."""
    seen: list[Tensor] = []

    def look(x: Any, out: Any) -> None:
        if not (isinstance(x, Tensor) and isinstance(out, Tensor) and len(out) == len(x)):
            return
        sound = out.detach().isfinite()
        if sound.device.type == "cpu" and bool(sound.all()):
            return
        odd = ~sound.flatten(1).all(1) & x.detach().isfinite().flatten(1).all(1)
        seen[:] = [odd.any() if not seen else seen[0] | odd.any()]  # a flag on the device: no look waits for it

    classifier = getattr(system, "classifier", None)
    with _module(classifier, look) if isinstance(classifier, nn.Module) else _logits(system, look):
        try:
            yield
        except AssertionError:  # undefined answers may lead an attack out of its budget
            if not _any(seen):
                raise
    if _any(seen):
        raise UserError(
            f"{system.name} answers {doing} with infinite or undefined logits, which decide nothing: no figure is "
            "given. Let it answer every image in [0, 1], and those a little beyond, with finite numbers (a root or "
            "logarithm of 0, or a division by 0, are the usual causes)"
        )


def _any(seen: list[Tensor]) -> bool:
    return bool(seen) and bool(seen[0])


@contextmanager
def _module(classifier: nn.Module, look: Any) -> Iterator[None]:
    """Every face of the system ends in its classifier."""
    handle = classifier.register_forward_hook(lambda module, given, out: look(given[0] if given else None, out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _logits(system: System, look: Any) -> Iterator[None]:
    """A system without a module of its own, such as a file: its faces and decisions ask for its logits."""
    plain = system.logits

    def logits(x: Tensor) -> Tensor:
        out = plain(x)
        look(x, out)
        return out

    vars(system)["logits"] = logits
    try:
        yield
    finally:
        del vars(system)["logits"]


@contextmanager
def remarked() -> Iterator[list[str]]:
    """While open, what attacks warn of is logged and collected, each line once; other warnings go where they went.
    For one thread of a process, as the ledger has it: warnings are the process's."""
    remarks: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", AttackWarning)
        show = warnings.showwarning

        def hear(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, AttackWarning):
                show(message, category, *where, **more)
            elif str(message) not in remarks:
                remarks.append(str(message))
                log.warning("%s", message)

        warnings.showwarning = hear
        yield remarks
