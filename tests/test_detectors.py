"""Kernel density and LID against other implementations and by hand; fitting, thresholds, files, whole systems."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import digits, fresh_network, system, trained_network
from sklearn.neighbors import KernelDensity as SklearnDensity
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from casemate.attacks.gradient import PGD
from casemate.attacks.joint import Joint
from casemate.detectors.base import DetectorSystem
from casemate.detectors.density import BANDWIDTHS, best_bandwidth, log_kernel_density, read
from casemate.detectors.er import ERDetector
from casemate.detectors.fitting import DetectorSpec, FittedDetector, false_alarm_threshold, scores_of
from casemate.detectors.kd import KD
from casemate.detectors.lid import LID, Dimensionality, activations, dimensionality
from casemate.errors import UserError
from casemate.evaluation.detection_protocol import load_detector, save_detector
from casemate.networks.base import build_network
from casemate.system import frozen
from casemate.threat import ThreatModel, untargeted

THREAT = ThreatModel("linf", 0.2)


@functools.cache
def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(training images and labels, held-out images and labels, what PGD makes of the latter)."""
    x, y = digits()
    held = x[1200:1500], y[1200:1500]
    attacked = PGD(steps=20, keep="last")(
        system(trained_network(), (1, 8, 8), 10), held[0], untargeted(held[1]), THREAT
    )
    return (x[:1200], y[:1200]), held, attacked.x_adv


def fitted(made: DetectorSpec) -> FittedDetector:
    train, (x, _), x_adv = images()
    return made.fit(trained_network(), train, x, x_adv)


# --- kernel density -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [0.2, 1.7])
def test_log_densities_are_those_of_scikit_learn(bandwidth: float) -> None:
    rng = np.random.default_rng(0)
    references, x = rng.normal(size=(30, 4)), rng.normal(size=(7, 4))
    theirs = SklearnDensity(bandwidth=bandwidth).fit(references).score_samples(x)
    ours = log_kernel_density(torch.from_numpy(x), torch.from_numpy(references), torch.tensor(bandwidth).double())
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)


def test_the_bandwidth_makes_the_held_out_fifth_most_likely() -> None:
    rng = np.random.default_rng(0)
    references = 0.7 * rng.normal(size=(50, 3))
    scores = [SklearnDensity(bandwidth=h).fit(references[10:]).score(references[:10]) for h in BANDWIDTHS.tolist()]
    assert 0 < int(np.argmax(scores)) < 19
    assert best_bandwidth(torch.from_numpy(references)) == pytest.approx(BANDWIDTHS[int(np.argmax(scores))].item())


def test_the_score_is_the_density_under_the_predicted_class() -> None:
    (x, y), (held, _), _ = images()
    f = trained_network()
    predicted, every = (KD(score=s).scorer(f, x, y) for s in ("predicted", "all"))
    with torch.no_grad():
        one, logits = predicted(f, held)
        ten, _ = every(f, held)
        assert one.shape == (300, 1) and ten.shape == (300, 10)
        torch.testing.assert_close(one[:, 0], ten.gather(1, logits.argmax(1)[:, None])[:, 0])
        torch.testing.assert_close(logits, f(held))
        c, at = 3, f.features(held)
        own = f.features(x[y == c])
        expected = log_kernel_density(at, own, every.bandwidth[c])
        torch.testing.assert_close(ten[:, c], expected, rtol=1e-4, atol=1e-3)


def test_options_of_the_density() -> None:
    (x, y), _, _ = images()
    f = trained_network()
    plain = KD().scorer(f, x, y)
    assert len(set(plain.bandwidth.tolist())) > 1
    assert KD(bandwidth=1.2).scorer(f, x, y).bandwidth.tolist() == pytest.approx([1.2] * 10)
    few = KD(per_class=7).scorer(f, x, y)
    assert len(few.references) == 70 and few.starts.tolist() == list(range(0, 71, 7))
    assert len(KD(per_class=None).scorer(f, x, y).references) == 1200
    assert not torch.equal(few.references, KD(per_class=7).scorer(f, x, y, seed=1).references)
    assert bool((plain.scale == 1).all()) and bool((plain.shift == 0).all())
    scaled = ERDetector().scorer(f, x, y)
    torch.testing.assert_close(scaled.references.mean(0), torch.zeros(48), rtol=0, atol=1e-4)
    alive = scaled.references.std(0) > 0
    assert int(alive.sum()) > 20
    torch.testing.assert_close(scaled.references.std(0)[alive], torch.ones(int(alive.sum())))
    with pytest.raises(UserError, match="two training images of each class, and class 9 has 0"):
        KD().scorer(f, x[y != 9], y[y != 9])


@pytest.mark.parametrize(
    ("name", "shape", "widths"),
    [("er_conv", (1, 28, 28), {"code": 4, "channels": 1924, "layers": 8}),
     ("er_vgg", (3, 32, 32), {"code": 16, "channels": 1488, "layers": 21})],
)  # fmt: skip
def test_what_is_read_has_the_papers_widths(name: str, shape: Any, widths: dict[Any, int]) -> None:
    f = build_network(name, input_shape=shape, num_classes=10).eval()
    x = torch.rand(1, *shape)
    with torch.no_grad():
        for reads, width in widths.items():
            features, logits = read(f, x, reads)
            assert features.shape == (1, width)
            torch.testing.assert_close(logits, f(x))
        first = f.taps(x, [f.layers[0]])[f.layers[0]]
        torch.testing.assert_close(read(f, x, "channels")[0][:, : first.shape[1]], first.mean((2, 3)))
        torch.testing.assert_close(read(f, x, "layers")[0][0, 0], first.mean())


@pytest.mark.parametrize(
    ("options", "reads"),
    [({}, "code"), ({"code": "combined"}, "channels"), ({"code": "combined", "means": "layers"}, "layers")],
)
def test_er1_and_er2(options: dict[str, Any], reads: str) -> None:
    assert ERDetector(**options).reads() == reads
    assert KD().reads() == "code" and not KD().standardise and ERDetector().standardise


# --- local intrinsic dimensionality -------------------------------------------------------------------------


def test_dimensionality_by_hand() -> None:
    """Neighbours at 1, 2, 4: -1 / mean(log 1/4, log 2/4, log 1) = 3 / (3 log 2)."""
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -4.0], [9.0, 9.0]])
    x = torch.zeros(1, 2)
    assert dimensionality(x, references, 3).item() == pytest.approx(3 / (3 * np.log(2)), rel=1e-5)
    # Without the nearest: 2, 4 and 9 root 2.
    far = 9 * 2**0.5
    expected = -3 / (np.log(2 / far) + np.log(4 / far))
    assert dimensionality(x, references, 3, skip=1).item() == pytest.approx(expected, rel=1e-5)


def test_neighbours_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    references, x = rng.normal(size=(100, 6)), rng.normal(size=(9, 6))
    r, _ = NearestNeighbors(n_neighbors=20).fit(references).kneighbors(x)
    ours = dimensionality(torch.from_numpy(x), torch.from_numpy(references), 20)
    np.testing.assert_allclose(ours.numpy(), -1 / np.log(r / r[:, -1:]).mean(1), rtol=1e-6)


def test_equal_distances_are_no_infinity() -> None:
    assert dimensionality(torch.zeros(1, 2), torch.eye(2), 2).item() == pytest.approx(1e6)


def test_every_layer_counts_and_references_are_training_images() -> None:
    (x, y), (held, _), _ = images()
    f = trained_network()
    scorer = LID().scorer(f, x, y)
    assert scorer.deployable and scorer.images.shape == (100, 1, 8, 8)
    with torch.no_grad():
        scores, logits = scorer(f, held[:5])
        assert scores.shape == (5, 5)  # input, conv1, conv2, fc1, logits
        torch.testing.assert_close(logits, f(held[:5]))
        references = activations(f, scorer.images)
        for at, a in enumerate(activations(f, held[:5])):
            torch.testing.assert_close(scores[:, at], dimensionality(a, references[at], 20))
        alone = torch.cat([scorer(f, held[i : i + 1])[0] for i in range(5)])
    torch.testing.assert_close(alone, scores, rtol=1e-3, atol=1e-3)  # no image depends on another


def test_the_published_batches_leak_the_original() -> None:
    """Each image meets its batch's clean originals without its nearest; a tail is filled up from before."""
    _, (held, _), x_adv = images()
    f, scorer = trained_network(), Dimensionality(20, 100, held[:0])
    assert not scorer.deployable
    with torch.no_grad():
        scores, _ = scorer(f, x_adv[:250], held[:250])
        for first, last, beside in ((0, 100, 0), (100, 200, 100), (200, 250, 150)):
            references = held[beside : max(last, beside + 100)].flatten(1)
            expected = dimensionality(x_adv[first:last].flatten(1), references, 20, skip=1)
            torch.testing.assert_close(scores[first:last, 0], expected)
        with pytest.raises(UserError, match="needs the clean originals"):
            scorer(f, held)
        with pytest.raises(UserError, match="needs a batch of 22 images, and has 21"):
            scorer(f, held[:21], held[:21])
    with pytest.raises(UserError, match="which no deployed system has: use reference: training"):
        fitted(LID(reference="batch"))
    with pytest.raises(UserError, match="a batch of 21 is too small for 20 neighbours"):
        LID(batch=21)
    with pytest.raises(UserError, match="there are 50 training images"):
        LID().scorer(f, held[:50], torch.zeros(50, dtype=torch.long))


# --- fitting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [KD(), ERDetector(code="combined"), KD(score="all"), LID()])
def test_a_fitted_detector_tells_natural_from_adversarial(made: DetectorSpec) -> None:
    _, (held, labels), x_adv = images()
    detector = fitted(made)
    guarded = DetectorSystem(trained_network(), detector, input_shape=(1, 8, 8), num_classes=10)
    with guarded.frozen():
        natural, adversarial = guarded.decide(held), guarded.decide(x_adv)
        flag, logits = detector.readout(held)
        torch.testing.assert_close(logits, trained_network()(held))
        assert torch.equal(natural, torch.where(flag > 0, -1, logits.argmax(1)))
    assert (natural == -1).float().mean() <= 0.05
    assert (natural == labels).float().mean() > 0.8
    assert (adversarial == -1).float().mean() > 0.15


@pytest.mark.parametrize("made", [KD(), KD(score="all"), ERDetector(code="combined"), LID()])
def test_the_readout_is_differentiable(made: DetectorSpec) -> None:
    """Against a finite difference, in float64."""
    _, (held, _), _ = images()
    f, detector = copy.deepcopy(trained_network()).double(), fitted(made)
    scorer, regression = (copy.deepcopy(part).double() for part in detector.modules)
    whole = FittedDetector(made, f, scorer, regression)  # type: ignore[arg-type]
    x = held[:6].double().requires_grad_()
    with frozen(f):
        (gradient,) = torch.autograd.grad(whole.readout(x)[0].sum(), x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
        ahead, behind = (whole.readout(x.detach() + s * 1e-6 * direction)[0] for s in (1, -1))
    slopes = (gradient * direction).flatten(1).sum(1)
    assert float(slopes.abs().min()) > 1e-4
    torch.testing.assert_close(slopes, (ahead - behind) / 2e-6, rtol=1e-3, atol=1e-5)


def test_thresholds() -> None:
    values = torch.arange(100.0)
    assert false_alarm_threshold(values, 0.05) == 94  # five of a hundred lie above it
    assert false_alarm_threshold(values, 0.0) == 99 and false_alarm_threshold(values, 1.0) == 0
    half, strict, loose = (
        fitted(KD(threshold="half")), fitted(KD(false_alarms=0.01)), fitted(KD(false_alarms=0.2))
    )  # fmt: skip
    assert float(half.regression.threshold) == 0
    _, (held, _), _ = images()
    flags = [float((d.readout(held)[0] > 0).float().mean()) for d in (strict, loose)]
    assert flags[0] < 0.0101 and 0.15 < flags[1] < 0.2001


def test_the_regression_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    g = torch.Generator().manual_seed(0)
    natural, adversarial = torch.randn(60, 2, generator=g), torch.randn(40, 2, generator=g) + 0.7
    made = KD().regress(natural, adversarial)
    both = torch.cat([natural, adversarial])
    scaled = (both - both.mean(0)) / both.std(0)
    theirs = LogisticRegression().fit(scaled.numpy(), [0] * 60 + [1] * 40)
    torch.testing.assert_close(
        made(both), torch.from_numpy(theirs.decision_function(scaled.numpy())).float(), rtol=1e-3, atol=1e-3
    )
    minmax = LID(regression="plain").regress(natural, adversarial)
    torch.testing.assert_close(minmax.shift, both.amin(0))
    torch.testing.assert_close(minmax.scale, both.amax(0) - both.amin(0))
    chosen = LID().regress(natural, adversarial)
    assert not torch.allclose(chosen.weight, minmax.weight)
    with pytest.raises(UserError, match="one of them is missing"):
        KD().regress(natural, adversarial[:0])
    with pytest.raises(UserError, match="a score is not finite"):
        KD().regress(natural, adversarial / 0)


def test_scores_in_chunks_are_scores() -> None:
    (x, y), (held, _), _ = images()
    f = trained_network()
    scorer = KD().scorer(f, x, y)
    long = torch.cat([held, held])
    scores, predicted = scores_of(scorer, f, long, long)
    assert scores.shape == (600, 1) and torch.equal(predicted[:300], predicted[300:])
    torch.testing.assert_close(scores[:300], scores[300:], rtol=1e-4, atol=1e-3)


def test_pieces_hold_whole_batches_of_references() -> None:
    """LID with `reference: batch`: 510 images leave a rest too small for its neighbours, 560 one that is no batch."""
    x, _ = digits()
    f, scorer = trained_network(), LID(reference="batch").scorer(trained_network(), *images()[0])
    assert scorer.together == 100 and LID().scorer(f, *images()[0]).together == 1
    moved = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for n in (510, 560, 620):
        scores, predicted = scores_of(scorer, f, moved[:n], x[:n])
        assert len(scores) == len(predicted) == n
        last = n - n % 100
        whole = dimensionality(moved[last:n].flatten(1), x[n - 100 : n].flatten(1), 20, skip=1)
        torch.testing.assert_close(scores[last:, 0], whole)
        torch.testing.assert_close(scores[:500, 0], scores_of(scorer, f, moved[:500], x[:500])[0][:, 0])
    few, _ = scores_of(scorer, f, moved[:30], x[:30])  # there are no more to fill the batch with
    torch.testing.assert_close(few[:, 0], dimensionality(moved[:30].flatten(1), x[:30].flatten(1), 20, skip=1))


def test_an_attack_that_knows_the_detector_evades_it_more_often() -> None:
    _, (held, labels), x_adv = images()
    guarded = DetectorSystem(trained_network(), fitted(KD()), input_shape=(1, 8, 8), num_classes=10)
    x, goal = held[:60], untargeted(labels[:60])
    blind = goal.reached(guarded.decide(x_adv[:60])).float().mean()
    joint = Joint(steps=20, rounds=5)(guarded, x, goal, THREAT).success.float().mean()
    assert joint > blind + 0.1


@pytest.mark.parametrize(
    ("name", "made"), [("kd", KD(score="all")), ("er", ERDetector(code="combined")), ("lid", LID())]
)
def test_files_give_the_detector_back(name: str, made: DetectorSpec, tmp_path: Path) -> None:
    _, (held, _), _ = images()
    detector = fitted(made)
    save_detector(tmp_path, name, detector, dataset="digits")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "weights.safetensors"]
    again = load_detector(tmp_path, trained_network())
    with torch.no_grad():
        assert torch.equal(again.readout(held)[0], detector.readout(held)[0])
    assert again.spec == detector.spec
    one, other = (
        DetectorSystem(trained_network(), d, input_shape=(1, 8, 8), num_classes=10).hash() for d in (detector, again)
    )
    assert one == other
    with pytest.raises(UserError, match="was fitted to another classifier"):
        load_detector(tmp_path, fresh_network(1))
