"""Figures from rows: intervals, tests, worst cases, against hand-made matrices."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_toys import BALL, cell
from scipy.stats import binomtest

from casemate.evaluation import robustness
from casemate.threat import ThreatModel

# Five images, three attacks; image 4 is a clean error.
CLEAN = [0, 0, 0, 0, 1]
MATRIX = {"a": [1, 0, 0, 0, 0], "b": [0, 1, 0, 0, 1], "c": [1, 1, 0, 0, 0]}
CELLS = {name: cell(column, CLEAN) for name, column in MATRIX.items()}


def test_accuracy_counts_clean_errors_and_is_clean_times_one_minus_asr() -> None:
    left = {name: robustness.figures(c)["accuracy"] for name, c in CELLS.items()}
    assert left == {"a": 3 / 5, "b": 3 / 5, "c": 2 / 5}
    assert robustness.attack_success_rate(CELLS["a"]) == 1 / 4
    assert robustness.clean_rate(CELLS["a"])["correct"] == 4
    for name, c in CELLS.items():
        asr = robustness.attack_success_rate(c)
        assert asr is not None and left[name] == pytest.approx(4 / 5 * (1 - asr))


def test_the_worst_case_is_the_union() -> None:
    worst = robustness.worst_case(CELLS, BALL)
    assert worst is not None
    assert (worst["accuracy"], worst["n"], worst["attacks"], worst["incomplete"]) == (2 / 5, 5, ["a", "b", "c"], [])
    assert all(worst["accuracy"] <= robustness.figures(c)["accuracy"] for c in CELLS.values())
    only = robustness.worst_case({"a": CELLS["a"], "b": CELLS["b"]}, BALL)
    assert only is not None and only["accuracy"] == 2 / 5  # below either attack alone


def test_images_outside_the_threat_model_do_not_count() -> None:
    far = cell([1, 1, 1, 1, 0], CLEAN, linf=0.3, l2=0.4)
    worst = robustness.worst_case({**CELLS, "far": far}, BALL)
    assert worst is not None and worst["accuracy"] == 2 / 5
    alone = robustness.worst_case({"far": far}, BALL)
    assert alone is not None and alone["accuracy"] == 4 / 5  # the clean error is one under any threat model
    wide = robustness.worst_case({"far": far}, ThreatModel("l2", 0.4))
    assert wide is not None and wide["accuracy"] == 0


def test_the_edge_of_the_ball_is_inside() -> None:
    edge = cell([1], [0], linf=float(np.float32(0.1) + np.float32(5e-7)))
    beyond = cell([1], [0], linf=0.1001)
    assert robustness.contained(edge, BALL).all() and not robustness.contained(beyond, BALL).any()


def test_an_incomplete_cell_is_named_and_shrinks_n() -> None:
    half = cell([1, 1], [0, 0], indices=[1, 2], asked=5)
    missing = cell([], [], asked=5)
    worst = robustness.worst_case({**CELLS, "half": half, "missing": missing}, BALL)
    assert worst is not None
    assert (worst["n"], worst["accuracy"]) == (2, 0.0)
    assert worst["incomplete"] == ["half", "missing"] and worst["attacks"] == ["a", "b", "c", "half"]
    assert robustness.worst_case({"missing": missing}, BALL) is None
    apart = cell([1], [0], indices=[9], asked=5)
    assert robustness.worst_case({"half": half, "apart": apart}, BALL) is None


def test_figures_of_a_cell() -> None:
    figures = robustness.figures(cell([1, 0], [0, 1], linf=0.1, l2=0.25))
    assert figures["forwards"] == 3 and figures["backwards"] == 2 and figures["queries"] == 0
    assert figures["linf_max"] == 0.1 and figures["l2_mean"] == 0.25 and figures["asr"] == 1.0
    assert robustness.figures(cell([1], [1]))["asr"] is None


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (9231, 10_000), (1, 3), (497, 1000)])
def test_wilson_intervals_are_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert robustness.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_images_no_knowledge() -> None:
    assert robustness.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (7, 0), (6, 0), (30, 12), (12, 30), (500, 430)])
def test_mcnemar_is_scipys_binomial_test(first: int, second: int) -> None:
    n = first + second
    expected = binomtest(first, n, 0.5, alternative="greater").pvalue if n else 1.0
    assert robustness.mcnemar(first, second) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("hits", "n", "rate"), [(0, 5, 0.1), (7, 1000, 0.002), (1000, 1000, 0.9), (3, 100, 0.002)])
def test_binomial_tails_are_scipys(hits: int, n: int, rate: float) -> None:
    expected = binomtest(hits, n, rate, alternative="greater").pvalue
    assert robustness.binomial_tail(hits, n, rate) == pytest.approx(expected, rel=1e-8)


def test_beats_needs_direction_and_significance() -> None:
    strong, weak = np.arange(40) < 12, np.arange(40) < 4
    assert robustness.beats(strong, weak)[0]  # 8 to 0: p = 1/256
    assert not robustness.beats(weak, strong)[0]
    assert not robustness.beats(np.arange(40) < 6, np.zeros(40, bool))[0]  # 6 to 0: p = 1/64
