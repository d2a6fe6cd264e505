"""Defense-GAN's detector: its score by hand, what an attacker differentiates, files, the protocol, refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import digits, system, trained_network
from test_defense_gan import generator_of_digits
from torch import Tensor

from casemate.attacks.gradient import PGD
from casemate.attacks.joint import Joint
from casemate.deploy.export import export_system
from casemate.deploy.metadata import About
from casemate.detectors.base import DetectorSystem
from casemate.detectors.fitting import FittedDetector, scores_of
from casemate.detectors.reconstruction import Reconstruction, ReconstructionError
from casemate.errors import UserError
from casemate.evaluation.detection_protocol import Protocol, load_detector, run_protocol, save_detector
from casemate.networks.base import build_network
from casemate.purification.projection import Descent
from casemate.seeding import generator as seeded
from casemate.system import frozen
from casemate.threat import ThreatModel, untargeted
from casemate.training.artifact import save_artifact
from casemate.training.checkpoint import file_hash

THREAT = ThreatModel("linf", 0.3)


@functools.cache
def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(training images and labels, held-out images and labels, what PGD makes of the latter)."""
    x, y = digits()
    held = x[1200:1400], y[1200:1400]
    alone = system(trained_network(), (1, 8, 8), 10)
    attacked = PGD(steps=20, keep="last")(alone, held[0], untargeted(held[1]), THREAT)
    return (x[:1200], y[:1200]), held, attacked.x_adv


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained row's folder, of which the generator is what counts."""
    folder = tmp_path_factory.mktemp("rows") / "defense_gan"
    save_artifact(folder, {"classifier": trained_network(), "generator": generator_of_digits()}, {"kind": "row"})
    return folder


def made(row: Path, **options: Any) -> Reconstruction:
    file = row / "weights.safetensors"
    return Reconstruction(**{"weights": str(file), "sha256": file_hash(file), "steps": 30, "restarts": 3, **options})


def fitted(spec: Reconstruction) -> FittedDetector:
    train, (x, _), x_adv = images()
    return spec.fit(trained_network(), train, x, x_adv)


def test_the_score_is_the_error_of_the_best_restart(row: Path) -> None:
    f, x = trained_network(), images()[1][0][:7]
    scorer = made(row).scorer(f, *images()[0])
    assert scorer.starts.shape == (3, 8) and scorer.deployable
    with torch.no_grad():
        scores, logits = scorer(f, x)
        torch.testing.assert_close(logits, f(x))
        alone = torch.cat([scorer(f, x[i : i + 1])[0] for i in range(7)])
    torch.testing.assert_close(alone, scores, rtol=1e-3, atol=1e-5)  # no image depends on another
    each = []
    for start in scorer.starts:
        image, _ = Descent(30, 1)(generator_of_digits(), x, start.expand(7, 1, 8))
        each.append((image.detach() - x).square().flatten(1).mean(1))
    assert len({int(best) for best in torch.stack(each).argmin(0)}) > 1
    torch.testing.assert_close(scores[:, 0], torch.stack(each).amin(0), rtol=1e-3, atol=1e-5)


def test_options_of_the_descent(row: Path) -> None:
    f, train, x = trained_network(), images()[0], images()[1][0][:40]

    def error(seed: int = 0, **options: Any) -> float:
        return float(scores_of(made(row, **options).scorer(f, *train, seed), f, x, x)[0].mean())

    usual = error()
    assert error(steps=120) < usual < error(steps=8) and error(restarts=6) < usual < error(restarts=1)
    assert len({usual, error(seed=1), error(rate=5.0), error(momentum=0.3)}) == 4
    plain = Reconstruction(weights="w", sha256="0" * 64)
    assert plain._descent() == Descent()  # the authors'
    scale = made(row, restarts=500).scorer(f, *train).starts.std()
    assert 0.33 < float(scale) < 0.375  # 8 ** -0.5


def test_a_fitted_detector_flags_what_the_generator_cannot_make(row: Path) -> None:
    _, (held, labels), x_adv = images()
    guarded = DetectorSystem(trained_network(), fitted(made(row)), input_shape=(1, 8, 8), num_classes=10)
    with guarded.frozen():
        natural, adversarial = guarded.decide(held), guarded.decide(x_adv)
        assert torch.equal(guarded.decide(held), natural)  # the starts are the same at every look
    assert (natural == -1).float().mean() <= 0.05 < 0.15 < (adversarial == -1).float().mean()
    assert (natural == labels).float().mean() > 0.8


# --- what an attacker differentiates ----------------------------------------------------------------------------


def in_double(row: Path, **options: Any) -> tuple[FittedDetector, Tensor]:
    """(a detector, twenty images), in float64."""
    spec = made(row, **options)
    detector, f = fitted(spec), copy.deepcopy(trained_network()).double()
    scorer, regression = (copy.deepcopy(part).double() for part in detector.modules)
    return FittedDetector(spec, f, scorer, regression), images()[1][0][:20].double()  # type: ignore[arg-type]


def slopes(detector: FittedDetector, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the log odds, its product with a direction, the same by finite differences)."""
    x = x.clone().requires_grad_()
    direction = torch.randn(x.shape, generator=seeded("direction")).double()
    with frozen(detector.classifier):
        (gradient,) = torch.autograd.grad(detector.readout(x)[0].sum(), x)
        with torch.no_grad():
            ahead, behind = (detector.readout(x + s * 1e-6 * direction)[0] for s in (1, -1))
    return gradient, (gradient * direction).flatten(1).sum(1), (ahead - behind) / 2e-6


def test_unrolled_the_gradient_is_exact(row: Path) -> None:
    detector, x = in_double(row, slope="unrolled", steps=5)
    _, found, expected = slopes(detector, x[:6])
    assert float(found.abs().min()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_with_the_code_fixed_it_is_that_of_the_distance_and_exact_where_the_descent_has_arrived(row: Path) -> None:
    detector, x = in_double(row, steps=5, restarts=1, rate=5.0)
    gradient, *early = slopes(detector, x)
    scorer = detector.scorer
    assert isinstance(scorer, ReconstructionError)
    image = scorer.descent(scorer.generator, x, scorer.starts.expand(20, -1, -1))[0].detach()
    per_unit = detector.regression.weight / detector.regression.scale
    torch.testing.assert_close(gradient, per_unit * 2 * (x - image) / 64)
    _, *late = slopes(in_double(row, steps=100, restarts=1, rate=5.0)[0], x)
    # the median: an image may have stopped at the edge of a ReLU
    off = [float(((found - exact) / exact).abs().median()) for found, exact in (early, late)]
    assert off[0] > 0.1 and off[1] < 0.06


@pytest.mark.parametrize("slope", ["fixed_code", "unrolled"])
def test_the_joint_attack_evades_it_more_often_than_a_blind_one(row: Path, slope: str) -> None:
    _, (held, labels), x_adv = images()
    spec = made(row, slope=slope, steps=15, restarts=1)
    guarded = DetectorSystem(trained_network(), fitted(spec), input_shape=(1, 8, 8), num_classes=10)
    x, goal = held[:30], untargeted(labels[:30])
    blind = goal.reached(guarded.decide(x_adv[:30])).float().mean()
    joint = Joint(steps=15, rounds=3)(guarded, x, goal, THREAT)
    assert joint.success.float().mean() > blind + 0.1
    assert bool((guarded.decide(joint.x_adv[joint.success]) != -1).all())


# --- the protocol, files ----------------------------------------------------------------------------------------


def test_the_protocol_judges_it_and_attacks_it(row: Path) -> None:
    train, (x, y), _ = images()
    attacks: Any = {"pgd": (PGD(steps=10, keep="last"), THREAT)}
    protocol = Protocol(share=0.3, adaptive=Joint(steps=4, rounds=2), adaptive_images=10)
    detectors = {"reconstruction": made(row, steps=20, restarts=2)}
    table = run_protocol(trained_network(), detectors, attacks, train, (x, y), protocol)
    own = next(r for r in table["rows"] if r["own"] and r["scope"] == "all")
    assert own["auroc"] > 0.7 and own["acc_nadv"] > 0.85
    assert [r["detector"] for r in table["adaptive"]] == ["reconstruction"]


def test_files_give_the_detector_back_without_the_row(row: Path, tmp_path: Path) -> None:
    spec = made(row, slope="unrolled", momentum=0.5)
    detector, x = fitted(spec), images()[1][0][:20]
    save_detector(tmp_path, "reconstruction", detector)
    again = load_detector(tmp_path, trained_network())
    assert again.made == spec and again.spec == detector.spec
    with torch.no_grad():
        assert torch.equal(again.readout(x)[0], detector.readout(x)[0])
    one, other = (
        DetectorSystem(trained_network(), d, input_shape=(1, 8, 8), num_classes=10).hash() for d in (detector, again)
    )
    assert one == other != DetectorSystem(
        trained_network(), fitted(made(row)), input_shape=(1, 8, 8), num_classes=10
    ).hash()  # fmt: skip


# --- refusals ---------------------------------------------------------------------------------------------------


def test_it_is_not_exported(row: Path, tmp_path: Path) -> None:
    guarded = DetectorSystem(trained_network(), fitted(made(row)), input_shape=(1, 8, 8), num_classes=10)
    with pytest.raises(UserError, match="Reconstruction: its score is a search: not exported") as told:
        export_system(guarded, tmp_path / "a.onnx", About("digits", tuple("0123456789"), "linf", 0.2))
    assert "\n" not in str(told.value) and not (tmp_path / "a.onnx").exists()


def test_what_holds_no_such_generator_is_refused(row: Path, tmp_path: Path) -> None:
    f, train = trained_network(), images()[0]
    with pytest.raises(UserError, match="does not exist: train a row with the method defense_gan first"):
        made(row, weights=str(tmp_path / "w.safetensors")).scorer(f, *train)
    with pytest.raises(UserError, match="it is another file, or damaged"):
        made(row, sha256="0" * 64).scorer(f, *train)
    with pytest.raises(UserError, match="sha256 has 64 digits, not 3"):
        made(row, sha256="abc")
    save_artifact(tmp_path, {"classifier": f}, {"kind": "row"})
    with pytest.raises(UserError, match="holds no generator of 1x8x8 images"):
        made(tmp_path).scorer(f, *train)
    colours = build_network("resnet20", input_shape=(3, 8, 8), num_classes=10)
    with pytest.raises(UserError, match="holds no generator of 3x8x8 images"):
        made(row).scorer(colours, torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
