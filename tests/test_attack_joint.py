"""Joint attacks on a classifier and its detector: what is flagged is no success, and c is found for each image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from torch import Tensor, nn

from casemate.attacks.gradient import PGD
from casemate.attacks.joint import Joint, Weighted, detected
from casemate.detectors.base import DetectorSystem
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.threat import Goal, ThreatModel, untargeted


class Regression:
    """Logistic regression on a network's features and their squares; flags what scores above `threshold`."""

    passes = (1, 1)

    def __init__(self, network: Classifier, score: nn.Module, threshold: float) -> None:
        self.network, self.scorer, self.threshold = network, score, threshold

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(x)
        return self.scorer(torch.cat([features, features**2], dim=1))[:, 0], self.network.head(features)

    def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score, logits = self.score(x)
        return score - self.threshold, logits

    @property
    def spec(self) -> dict[str, Any]:
        return {"detector": "regression", "threshold": self.threshold}

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [self.scorer]


THREAT = ThreatModel("linf", 0.25)


@functools.cache
def guarded() -> DetectorSystem:
    """The digits network behind a detector fitted to PGD on the first 800 images, with 5 % false alarms on them."""
    network, (x, y) = trained_network(), digits()
    x, goal = x[:800], untargeted(y[:800])
    attacked = PGD(steps=20, keep="last")(system(network, (1, 8, 8), 10), x, goal, THREAT).x_adv
    torch.manual_seed(0)
    scorer = nn.Sequential(nn.BatchNorm1d(96, affine=False), nn.Linear(96, 1))
    detector = Regression(network, scorer, 0.0)
    optimizer = torch.optim.Adam(scorer.parameters(), 0.02)
    both = torch.cat([x, attacked])
    target = torch.cat([torch.zeros(800), torch.ones(800)])
    with torch.no_grad():
        features = network.features(both)
    read = torch.cat([features, features**2], dim=1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(scorer(read)[:, 0], target).backward()
        optimizer.step()
    scorer.eval()
    with torch.no_grad():
        detector.threshold = float(detector.score(x)[0].quantile(0.95))
    return DetectorSystem(network, detector, input_shape=(1, 8, 8), num_classes=10)


def test_a_detector_that_stops_blind_attacks_does_not_stop_joint_ones() -> None:
    victim, (x, y) = guarded(), digits()
    x, goal = x[1000:1150], untargeted(y[1000:1150])
    clean = victim.decide(x)
    assert (clean == goal.labels).float().mean() > 0.8 and (clean == -1).float().mean() < 0.15
    blind = PGD(steps=40)(victim, x, goal, THREAT)
    plain = system(trained_network(), (1, 8, 8), 10).decide(blind.x_adv)
    assert (
        plain != goal.labels
    ).all()  # the classifier alone is fooled everywhere, and the detector stops half of it
    assert (blind.prediction == -1).float().mean() > 0.4
    one, joint = (Joint(steps=40, rounds=n)(victim, x, goal, THREAT) for n in (1, 5))
    assert joint.success.float().mean() > blind.success.float().mean() + 0.4
    assert joint.success.sum() > one.success.sum()  # some images need another c
    assert (joint.prediction[joint.success] >= 0).all()


def test_what_is_flagged_is_rejected_and_no_success() -> None:
    victim, (x, _) = guarded(), digits()
    assert victim.detector is not None
    score, logits = victim.detector.readout(x)
    assert torch.equal(victim.decide(x), torch.where(score > 0, -1, logits.argmax(1)))
    assert torch.equal(logits, victim.logits(x))
    face = detected(victim.views()["adaptive"], victim.detector)
    assert torch.equal(face.labels(face.logits(x), x), victim.decide(x)) and face.exact
    assert not victim.views()["adaptive"].exact and victim.changes_inference


class Band:
    """Flags where pixel 1 is above `edge`; the logits are the classifier's."""

    passes = (1, 1)
    modules: Sequence[nn.Module] = ()

    def __init__(self, classifier: nn.Module, edge: float, slope: float) -> None:
        self.classifier, self.edge, self.slope = classifier, edge, slope

    @property
    def spec(self) -> dict[str, Any]:
        return {"edge": self.edge, "slope": self.slope}

    def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        return self.slope * (flat[:, 1] - self.edge), self.classifier(x)


def coupled(
    slope: float, weights: tuple[float, float] = (2.0, 1.0), bound: float = 1.65, edge: float = 0.5,
    counter: bool = False,
) -> tuple[DetectorSystem, Any]:  # fmt: skip
    """Class 1 where weights . pixels > bound; flagged where pixel 1 > edge."""
    head = linear_system(torch.tensor([[0.0, 0.0], [*weights]]), torch.tensor([bound, 0.0])).classifier
    model: nn.Module = Counter(head) if counter else head
    return DetectorSystem(model, Band(model, edge, slope), input_shape=(1, 1, 2), num_classes=2), model


def point(n: int = 1) -> tuple[Tensor, Goal]:
    return torch.full((n, 1, 1, 2), 0.5), untargeted(torch.zeros(n, dtype=torch.long))


STILL: dict[str, Any] = {"steps": 20, "random_start": False}


@pytest.mark.parametrize(("slope", "tried"), [(1.5, 1), (0.15, 2), (0.08, 3)])
def test_c_goes_up_until_the_detector_counts(slope: float, tried: int) -> None:
    """The class climbs pixel 1 with slope 1, the detector lowers it with c x slope. Up is flagged at once; down, the
    other pixel alone reaches the class, at (0.7, 0.3). The values of c are 1, 10 and 31.6."""
    (victim, _), (x, goal), threat = coupled(slope), point(), ThreatModel("linf", 0.2)
    blind = PGD(**STILL, objective="margin")(victim, x, goal, threat)
    assert blind.prediction.tolist() == [-1]
    found = Joint(**STILL, rounds=tried)(victim, x, goal, threat)
    assert found.success.all() and float(found.x_adv[0, 0, 0, 1]) < 0.4
    if tried > 1:
        assert not Joint(**STILL, rounds=tried - 1)(victim, x, goal, threat).success.any()


def test_c_goes_down_where_the_class_is_not_reached() -> None:
    """Pixel 1 carries the class, and a strong detector pulls it down although nothing is flagged. Only with c below
    3 / 40 does it rise, and reach the class before it is flagged: at the third value, 0.0316."""
    (victim, _), (x, goal), threat = coupled(40.0, (2.0, 3.0), 2.9, edge=0.6), point(), ThreatModel("linf", 0.2)
    two = Joint(**STILL, rounds=2)(victim, x, goal, threat)
    assert two.prediction.tolist() == [0]
    three = Joint(**STILL, rounds=3)(victim, x, goal, threat)
    assert three.success.all() and 0.55 < float(three.x_adv[0, 0, 0, 1]) <= 0.6


def test_rounds_are_counted_and_end_with_success() -> None:
    (victim, counter), (x, goal) = coupled(1.5, counter=True), point(3)
    attack = Joint(steps=6, rounds=4)
    bound = attack.passes(victim.views()["adaptive"], 3)
    assert bound == (3 * 24, 3 * 24, 9)
    result = attack(victim, x, goal, ThreatModel("linf", 0.01))  # too small a ball
    assert not result.success.any()
    assert result.cost.forwards.tolist() == [24 + 1] * 3 and result.cost.backwards.tolist() == [24] * 3
    assert result.cost.queries.tolist() == [3] * 3
    assert sum(counter.forwards) == 3 * (24 + 3 + 1)
    early = attack(victim, x, goal, ThreatModel("linf", 0.4), seed=1)
    assert early.success.all() and int(early.cost.forwards.max()) <= 2 * 6 + 1


def test_a_weighted_goal_follows_its_rows() -> None:
    goal = Weighted(torch.arange(4), None, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = goal[torch.tensor([3, 1])]
    assert half.labels.tolist() == [3, 1] and half.weight is not None and half.weight.tolist() == [4.0, 2.0]
    masked = goal[torch.tensor([True, False, False, True])]
    assert isinstance(masked, Weighted) and masked.weight is not None and masked.weight.tolist() == [1.0, 4.0]


def test_the_systems_hash_knows_its_detector() -> None:
    first = coupled(1.0)[0]
    assert first.hash() == coupled(1.0)[0].hash() != coupled(2.0)[0].hash()
    assert first.offers == {"gradient", "scores", "labels", "detector"}
    assert set(first.adaptive_attacks()) == {"joint"}


def test_it_is_refused_without_a_detector() -> None:
    x, y = digits()
    with pytest.raises(UserError, match="Joint needs detector"):
        Joint()(system(trained_network(), (1, 8, 8), 10), x[:2], untargeted(y[:2]), THREAT)
    with pytest.raises(UserError, match="lowest"):
        Joint(lowest=2.0, highest=1.0)
