"""Every form of inference as a file: ensembles of noise draws, detectors; what cannot be one says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from casemate import registry
from casemate.data import Loaded
from casemate.defenses.rse import RSE
from casemate.deploy.export import ExportOptions, export_system, form_of
from casemate.deploy.metadata import FORMS
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.parity import Labelled, export_with_parity, parity_report
from casemate.detectors.base import DetectorSystem
from casemate.errors import UserError
from casemate.networks.base import Classifier, build_network
from casemate.randomised import RandomisedSystem
from casemate.system import System
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.recipe import Recipe
from tests.deploy_toys import ABOUT, SHAPE, fitted_system


def images(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def test_set(digits: Loaded) -> Labelled:
    return Labelled(digits[2].images, digits[2].labels)


@pytest.fixture(scope="module")
def classifier(digits: Loaded) -> Classifier:
    found = fitted_system(digits).classifier
    assert isinstance(found, Classifier)
    return found


def noisy(position: str = "before", ensemble: int = 3, sigma: float = 0.1) -> RandomisedSystem:
    torch.manual_seed(1)
    net = build_network("digits_cnn", input_shape=SHAPE, num_classes=10).eval()
    assert isinstance(net, Classifier)
    RSE(position=position, sigma_input=sigma).add_noise(net)  # type: ignore[arg-type]
    return RandomisedSystem(net, input_shape=SHAPE, num_classes=10, ensemble=ensemble, votes=2, seed=5)


@pytest.mark.parametrize("position", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_seeded_noise_is_the_systems_own(position: str, test_set: Labelled, tmp_path: Path) -> None:
    system, path = noisy(position), tmp_path / "a.onnx"
    report = export_with_parity(system, path, ABOUT, test_set, n=100)
    assert report["form"] == "ensemble" and report["passed"]
    file = OnnxSystem(path, "cpu")
    for n in (1, 7):
        with torch.no_grad():
            torch.testing.assert_close(file.logits(images(n)), system.logits(images(n)), rtol=1e-5, atol=1e-5)
    assert file.metadata is not None and file.metadata.ensemble == {"draws": 3, "noise": "seeded", "seed": 5}
    assert file.views()["adaptive"].exact and not file.stochastic
    assert "RandomNormalLike" not in {node.op_type for node in onnx.load(path).graph.node}


def test_random_noise_is_drawn_at_every_run(test_set: Labelled, tmp_path: Path) -> None:
    system, path = noisy(), tmp_path / "a.onnx"
    options = ExportOptions(noise="random", draws=4)
    report = export_with_parity(system, path, ABOUT, test_set, n=100, options=options)
    assert [c["name"] for c in report["checks"]][:2] == ["labels", "repeats"]
    file, x = OnnxSystem(path, "cpu"), images(5)
    assert file.metadata is not None and file.metadata.ensemble == {"draws": 4, "noise": "random"}
    first, second = file.logits(x), file.logits(x)
    assert not torch.equal(first, second)
    same = file.logits(x[:1].expand(5, -1, -1, -1))
    assert not torch.equal(same[0], same[1])  # each image has noise of its own
    assert file.stochastic and not file.views()["adaptive"].exact


@pytest.mark.slow
def test_draws_are_an_option_and_more_of_them_come_nearer_to_the_mean(tmp_path: Path) -> None:
    system, x = noisy(ensemble=200, sigma=0.2), images(20)
    with torch.no_grad():
        mean = system.logits(x).softmax(1)
    far = []
    for draws in (1, 30):
        options = ExportOptions(noise="random", draws=draws)
        export_system(system, tmp_path / "a.onnx", ABOUT, options=options)
        far.append(float((OnnxSystem(tmp_path / "a.onnx", "cpu").logits(x).softmax(1) - mean).abs().mean()))
    assert far[1] < 0.5 * far[0]


def test_a_file_whose_noise_stands_still_or_is_of_another_seed_fails_parity(
    test_set: Labelled, tmp_path: Path
) -> None:
    system, path = noisy(), tmp_path / "a.onnx"
    export_system(system, path, ABOUT)
    other = noisy()
    other.seed = 6
    failed = {c["name"] for c in parity_report(other, path, test_set, n=50)["checks"] if not c["passed"]}
    assert "logits" in failed
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "ensemble":
            entry.value = '{"draws": 3, "noise": "random"}'
    onnx.save(model, path)
    failed = {c["name"] for c in parity_report(system, path, test_set, n=50)["checks"] if not c["passed"]}
    assert "repeats" in failed


# --- detectors ------------------------------------------------------------------------------------------------

DETECTORS: list[Any] = [
    ("kd", {}), ("lid", {"k": 5, "batch": 40}), pytest.param("kd", {"score": "all"}, marks=pytest.mark.slow),
    pytest.param("er", {"code": "combined"}, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), DETECTORS)
def test_a_detectors_score_is_in_the_file(
    name: str, options: dict[str, Any], classifier: Classifier, digits: Loaded, test_set: Labelled, tmp_path: Path
) -> None:
    train = torch.tensor(digits[1].images[:400]).permute(0, 3, 1, 2).contiguous().float() / 255
    y = torch.tensor(digits[1].labels[:400]).long()
    natural = torch.tensor(test_set.images[300:400]).permute(0, 3, 1, 2).contiguous().float() / 255
    attacked = (natural + 0.3 * torch.randn(natural.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    detector = registry.resolve("detector", name)(**options).fit(classifier, (train, y), natural, attacked)
    system = DetectorSystem(classifier, detector, input_shape=SHAPE, num_classes=10)
    noisy = Labelled(attacked.numpy(), test_set.labels[300:400])
    report = export_with_parity(system, tmp_path / "a.onnx", ABOUT, test_set, adversarial=noisy, n=200)
    assert "detector" in {c["name"] for c in report["checks"]} and report["passed"]
    file = OnnxSystem(tmp_path / "a.onnx", "cpu")
    assert file.outputs == ["logits", "probabilities", "detector"]
    decided, expected = file.decide(attacked), system.decide(attacked)
    assert (decided == expected).float().mean() > 0.98
    assert (decided == -1).any() and (decided != -1).any()
    assert not file.views()["adaptive"].exact and "static" not in file.views()
    assert file.metadata is not None and file.metadata.detector == detector.spec


def test_a_detector_that_is_no_fixed_function_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    class Elsewhere:
        """Stands for a service that scores."""

        passes = (1, 1)
        spec: dict[str, Any] = {}  # noqa: RUF012
        modules: tuple[()] = ()

        def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1).mean(1), classifier(x)

    system = DetectorSystem(classifier, Elsewhere(), input_shape=SHAPE, num_classes=10)
    with pytest.raises(UserError, match="Elsewhere: its score is no fixed function"):
        export_system(system, tmp_path / "a.onnx", ABOUT)


# --- every defense --------------------------------------------------------------------------------------------


def systems(name: str) -> list[tuple[str, System]]:
    """An untrained system of a registered defense in each of its modes, on a network that suits them all."""
    threat, shape = ThreatModel("linf", 0.1), (1, 28, 28)
    made = registry.resolve("defense", name)()
    task = Task(
        input_shape=shape, num_classes=10, threat=threat, seed=0,
        player=Recipe(epochs=1, batch_size=8, lr=0.01).player,
        network=lambda: build_network("er_conv", input_shape=shape, num_classes=10),
    )  # fmt: skip
    modules = made.modules(task)
    return [
        (mode, made.system(modules, mode, input_shape=shape, num_classes=10, threat=threat))
        for mode in made.inference_modes
    ]


SEARCHES = {("defense_gan", "gan")}


@pytest.mark.parametrize("name", registry.names("defense"))
def test_every_mode_of_every_defense_has_a_form_or_says_why_not(name: str) -> None:
    for mode, system in systems(name):
        if (name, mode) in SEARCHES:
            with pytest.raises(UserError, match="cannot be exported: purification Projection searches by gradient"):
                form_of(system)
        else:
            assert form_of(system) in FORMS
