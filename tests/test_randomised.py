"""Systems that answer with noise: averaged over draws in the search, judged by draws that the search never saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, linear_system, trained_network
from torch import Tensor, nn

from casemate.attacks.diagnostics import zero_gradients
from casemate.attacks.gradient import PGD
from casemate.data import Loaded
from casemate.data.base import Images
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.plan import not_evaluated
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About, Candidate, evaluate_row
from casemate.randomised import GaussianNoise, RandomisedSystem, drawn, noise_layers
from casemate.seeding import generator
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted


class Recorded(GaussianNoise):
    """Keeps the noise it adds."""

    def __init__(self, sigma: float) -> None:
        super().__init__(sigma)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.append((out - x).detach()[0].clone())
        return out


def noisy(sigma: float = 0.3, **options: Any) -> RandomisedSystem:
    """The digits network behind one noise layer."""
    model = nn.Sequential(Recorded(sigma), trained_network())
    return RandomisedSystem(model, input_shape=(1, 8, 8), num_classes=10, **options)


def pixel(sigma: float, slope: float = 4.0, **options: Any) -> RandomisedSystem:
    """One pixel with noise; class 1 above 0.5, its logit steep."""
    head = linear_system(torch.tensor([[0.0], [slope]]), torch.tensor([slope / 2, 0.0])).classifier
    return RandomisedSystem(
        nn.Sequential(GaussianNoise(sigma), head), input_shape=(1, 1, 1), num_classes=2, **options
    )


def noise_of(*use: object, layer: int = 0) -> float:
    """What one-pixel noise of a use must be, drawn here again."""
    return float(torch.randn(1, generator=generator("noise", *use, layer)))


def test_without_noise_it_is_the_plain_network() -> None:
    x, _ = digits()
    silent = noisy(0.0, ensemble=3)
    plain = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    torch.testing.assert_close(silent.logits(x), plain.logits(x).log_softmax(1))
    assert torch.equal(silent.decide(x), plain.decide(x))


def test_noise_stays_on_in_eval_mode_and_is_fresh_outside_of_draws() -> None:
    model = nn.Sequential(GaussianNoise(1.0), nn.Flatten()).eval()
    x = torch.zeros(3, 1, 2, 2)
    first, second = model(x), model(x)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    with drawn(model, "a", 1):
        again, same = model(x), model(x)
        assert torch.equal(again, same) and torch.equal(again[0], again[2])
        with drawn(model, "b"):
            assert not torch.equal(model(x), again)
        assert torch.equal(model(x), again)
    assert noise_layers(model)[0].key is None


def test_logits_are_the_log_of_the_mean_softmax() -> None:
    system = pixel(0.5, ensemble=4, seed=7)
    x = torch.tensor([0.45, 0.8]).view(2, 1, 1, 1)
    chances = torch.tensor(
        [
            [1 / (1 + math.exp(-4 * (v + 0.5 * noise_of(7, "answer", 0, k) - 0.5))) for k in range(4)]
            for v in (0.45, 0.8)
        ]
    ).mean(1)
    expected = torch.stack([1 - chances, chances], dim=1).log()
    torch.testing.assert_close(system.logits(x), expected)


def test_the_gradient_is_that_of_the_mean_over_the_draws() -> None:
    system = pixel(0.5, draws=6)
    view = system.views()["adaptive"]
    leaf = torch.tensor([0.4]).view(1, 1, 1, 1).requires_grad_()
    (found,) = torch.autograd.grad(view.logits(leaf)[0, 1], leaf)
    chances = [1 / (1 + math.exp(-4 * (0.4 + 0.5 * noise_of(0, "search", "adaptive", 1, k) - 0.5))) for k in range(6)]
    assert float(found) == pytest.approx(4 * sum(p * (1 - p) for p in chances) / sum(chances), rel=1e-5)
    assert view.passes == (6, 6) and not view.exact


def test_the_decision_is_a_majority_of_answers() -> None:
    """One draw to an answer: the noise says how each of the votes falls."""
    values = torch.linspace(0.2, 0.8, 13)
    system = pixel(0.4, ensemble=1, votes=5)
    votes = [[float(v) + 0.4 * noise_of(0, "answer", n, 0) > 0.5 for n in range(5)] for v in values]
    expected = [int(sum(v) >= 3) for v in votes]
    assert 0 < sum(expected) < 13 and any(0 < sum(v) < 5 for v in votes)
    assert system.decide(values.view(-1, 1, 1, 1)).tolist() == expected


def test_a_tie_goes_to_the_higher_mean_probability() -> None:
    system = pixel(0.4, ensemble=1, votes=2)
    ties = 0
    for value in torch.linspace(0.2, 0.8, 25).tolist():
        at = [value + 0.4 * noise_of(0, "answer", n, 0) - 0.5 for n in range(2)]
        chances = [1 / (1 + math.exp(-4 * a)) for a in at]
        if (at[0] > 0) != (at[1] > 0):
            ties += 1
            assert system.decide(torch.tensor(value).view(1, 1, 1, 1)).tolist() == [int(sum(chances) > 1)]
    assert ties


def test_the_search_never_sees_the_noise_of_the_decision() -> None:
    system = noisy(ensemble=3, draws=4, votes=3)
    recorder = noise_layers(system.classifier)[0]
    assert isinstance(recorder, Recorded)
    x, y = digits()
    view = system.views()["adaptive"]
    for _ in range(3):
        view.logits(x[:2])
    view.decide(x[:2])
    searched = recorder.seen[:]
    recorder.seen.clear()
    decided = system.decide(x[:2])
    judged = recorder.seen[:]
    assert len(searched) == 3 * 4 + 3 * 3 and len(judged) == 9
    for index, noise in enumerate(searched):  # every draw is another, and none comes back
        others = [*searched[:index], *judged]
        assert not any(torch.equal(noise, other) for other in others)
    assert torch.equal(system.decide(x[:2]), decided)

    recorder.seen.clear()
    PGD(steps=3)(system, x[:2], untargeted(y[:2]), ThreatModel("linf", 0.1))
    assert len(recorder.seen) == 4 * 4 + 9  # three steps and a look at the last iterate; the verification
    torch.testing.assert_close(torch.stack(recorder.seen[-9:]), torch.stack(judged))
    assert not any(torch.equal(a, b) for a in recorder.seen[:-9] for b in judged)


def test_passes_are_counted_in_draws() -> None:
    counter = Counter(trained_network())
    model = nn.Sequential(GaussianNoise(0.1), counter)
    system = RandomisedSystem(model, input_shape=(1, 8, 8), num_classes=10, ensemble=3, draws=4, votes=5)
    x, y = digits()
    result = PGD(steps=2)(system, x[:6], untargeted(y[:6]), ThreatModel("linf", 0.1))
    assert result.cost.forwards.tolist() == [2 * 4 + 3 * 5] * 6 and result.cost.backwards.tolist() == [8] * 6
    assert result.cost.queries.tolist() == [1] * 6
    assert counter.forwards == [6] * (8 + 4 + 15) and counter.gradients == [6] * 8


def test_an_images_answer_depends_on_no_other_image() -> None:
    x, _ = digits()
    whole, part = noisy(), noisy()
    torch.testing.assert_close(whole.views()["adaptive"].logits(x[:9])[4:5], part.views()["adaptive"].logits(x[4:5]))
    torch.testing.assert_close(whole.logits(x[:9])[4:5], part.logits(x[4:5]))


def test_averaging_beats_a_single_draw() -> None:
    """With much noise one draw's gradient says little: the same steps fell far fewer images."""
    x, y = digits()
    system = noisy(0.5, ensemble=10, draws=16)
    x, goal = x[1500:1600], untargeted(y[1500:1600])
    threat, attack = ThreatModel("linf", 0.12), PGD(steps=5, random_start=False)
    left = {v: float((~attack(system, x, goal, threat, view=v).success).float().mean()) for v in system.views()}
    assert left["adaptive"] < left["static"] - 0.05
    with system.frozen():
        assert not zero_gradients(system.views()["adaptive"], x, goal).any()


def test_the_hash_knows_every_number() -> None:
    first = noisy().hash()
    assert first == noisy().hash()
    changed = [noisy(0.31), noisy(ensemble=9), noisy(draws=19), noisy(votes=3), noisy(seed=1)]
    assert len({first, *(system.hash() for system in changed)}) == 6


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(UserError, match="no noise layer"):
        RandomisedSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    with pytest.raises(UserError, match="at least 1"):
        noisy(draws=0)


def test_it_is_evaluated_through_both_faces(digits: Loaded, tmp_path: Path) -> None:
    data = EvaluationSet(Images(digits.test.images[:40], digits.test.labels[:40]))
    system = noisy(ensemble=2, draws=3, votes=3)
    assert not_evaluated(system) is None
    suites = {"core": {"attacks": {"pgd": {"attack": "pgd", "options": {"steps": 2}}}}}
    given = EvaluateParams.model_validate({"chunk": 40, "subset": 10, "suites": suites, "gate": None})
    about = About("smoke", "row", "rse", "digits", "digits_cnn", tuple("0123456789"), {"effective_epochs": 2.0})

    def run(root: str) -> dict[str, Any]:
        ledger = Ledger(tmp_path / root, 40)
        ball = ThreatModel("linf", 0.1)
        return evaluate_row(about, [Candidate(system)], data, ball, given, ledger, say=lambda _: None).report

    entry = run("a")["systems"][0]
    assert [(c["view"], c["forwards"]) for c in entry["cells"]] == [("adaptive", 2 * 3 + 6), ("static", 2 + 6)]
    assert "not_evaluated" not in entry and entry["worst"]["core"]["static"]["attacks"] == ["pgd"]
    assert run("b")["systems"][0] == entry
