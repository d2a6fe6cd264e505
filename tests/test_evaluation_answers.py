"""A system that answers with what is no number gets no figure, whenever in an attack it does so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_toys import BALL, SHAPE, images, linear
from torch import Tensor, nn

from casemate.attacks.base import Attack
from casemate.attacks.black_box import RayS
from casemate.attacks.gradient import FGSM, PGD
from casemate.errors import UserError
from casemate.evaluation.answers import all_finite
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.probes import Identity
from casemate.system import System, TorchSystem, View

SOUND = linear()
DATA = images(SOUND)


class Broken(nn.Module):
    """A sound network, undefined where a pixel is no whole grey level: everywhere, or off the clean images."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.sound, self.everywhere = SOUND.classifier, everywhere

    def forward(self, x: Tensor) -> Tensor:
        off = ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(1) | self.everywhere
        out: Tensor = self.sound(x)
        return torch.where(off.view(-1, 1), torch.nan, out)


class Answering(System):
    """The same behind an interface that only answers."""

    name, input_shape, num_classes, offers = "answering", SHAPE, 3, frozenset({"scores", "labels"})

    def __init__(self, model: nn.Module) -> None:
        self.model = [model]

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.model[0](x)
        return out

    def views(self) -> dict[str, View]:
        return {"adaptive": View("adaptive", self.logits, True, self.offers)}

    def hash(self) -> str:
        return "answering"


def torch_system(everywhere: bool) -> System:
    return TorchSystem(Broken(everywhere), input_shape=SHAPE, num_classes=3, name="broken")


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=3, step_size=0.0314, random_start=False), RayS(queries=50)])
@pytest.mark.parametrize("made", [torch_system, lambda everywhere: Answering(Broken(everywhere))])
def test_undefined_answers_during_an_attack_are_an_error(tmp_path: Path, attack: Attack, made: object) -> None:
    system: System = made(False)  # type: ignore[operator]
    ledger = Ledger(tmp_path, 30)
    assert len(ledger.clean(system, DATA, range(60))) == 60
    if attack.needs <= system.offers:
        with pytest.raises(
            UserError, match=r"answers images that \w+ tried with infinite or undefined logits"
        ) as told:
            ledger.run(system, DATA, attack, BALL, "adaptive", range(60))
        assert "\n" not in str(told.value) and "no figure is given" in str(told.value)
        assert len(ledger.read(system, DATA, attack, BALL, "adaptive", range(60))) == 0


@pytest.mark.parametrize("made", [torch_system, lambda everywhere: Answering(Broken(everywhere))])
def test_a_model_that_answers_nothing_is_not_clean_either(tmp_path: Path, made: object) -> None:
    system: System = made(True)  # type: ignore[operator]
    for attack in (Identity(), RayS(queries=50)):
        with pytest.raises(UserError, match="answers the clean images with infinite or undefined logits"):
            Ledger(tmp_path, 30).run(system, DATA, attack, BALL, "adaptive", range(60))


def test_watching_changes_nothing_and_blames_no_model_for_an_image_that_is_none() -> None:
    x = DATA.take(range(4))[0]
    plain = SOUND.logits(x)
    with all_finite(SOUND, "these"):
        assert torch.equal(SOUND.logits(x), plain)
        SOUND.logits(torch.full_like(x, torch.nan))
    assert not SOUND.classifier._forward_hooks
    served = Answering(SOUND.classifier)
    with all_finite(served, "these"):
        assert torch.equal(served.logits(x), plain)
        served.logits(torch.full_like(x, torch.nan))
    assert "logits" not in vars(served)
