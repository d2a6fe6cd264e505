"""The study: rates over the images that were right, distances of successes, ablations, JSON and pictures."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import images, linear
from PIL import Image

from casemate.errors import UserError
from casemate.evaluation import segments
from casemate.evaluation import study as s
from casemate.evaluation.attacked import STORED, Attacked
from casemate.evaluation.ledger import Cell, Ledger
from casemate.reporting.study import pictures

# Six images of classes 0 and 1: the last is a clean error, the fifth is rejected under attack.
LABELS = np.array([0, 0, 1, 1, 0, 0])
CLEAN = np.array([0, 0, 1, 1, 0, 1])
FOUND = np.array([1, 0, 2, 0, -1, 1])


def case(
    found: Any = FOUND, *, attack: str = "a", model: str = "net", moved: float | None = None, **more: Any
) -> Any:
    if moved is not None:
        x = np.full((6, 1, 2, 2), 0.5, np.float32)
        steps = np.linspace(moved, 2 * moved, 6, dtype=np.float32)
        more |= {"x_clean": x, "x_adv": x + steps[:, None, None, None]}
    return Attacked(model, attack, LABELS, CLEAN, np.asarray(found), **more)


def test_the_denominator_is_what_was_right_before() -> None:
    figures = s.success(case())
    assert (figures["hits"], figures["n"], figures["images"]) == (3, 5, 6)
    assert figures["asr"] == 3 / 5 and figures["clean_accuracy"] == 5 / 6
    assert figures["accuracy"] == pytest.approx(figures["clean_accuracy"] * (1 - figures["asr"]))
    assert figures["low"] < 0.6 < figures["high"] and "asr_any" not in figures and "oracle_agrees" not in figures
    nothing = Attacked("net", "a", LABELS, 1 - LABELS, FOUND)
    assert s.success(nothing)["asr"] is None and s.success(nothing)["n"] == 0


def test_what_lies_beyond_the_budget_is_no_hit() -> None:
    inside = np.array([True, True, False, True, True, True])
    assert (s.success(case(counts=inside))["hits"], s.success(case(counts=inside))["n"]) == (2, 5)


def test_a_minimum_norm_attack_counts_inside_the_threat_model_as_on_the_leaderboard(tmp_path: Path) -> None:
    from casemate.attacks.carlini_wagner import CWL2
    from casemate.evaluation.robustness import fallen
    from casemate.threat import ThreatModel

    system = linear()
    data = images(system, n=20, wrong=2)
    attack, far = CWL2(steps=60, rounds=4, rate=0.05, first_weight=10.0), ThreatModel("l2", 9.0)
    cell = Ledger(tmp_path, chunk=10).run(system, data, attack, far, "static", list(range(20)))
    assert s.success(Attacked.of_cell("linear", "cw_l2", cell))["asr"] == 1
    threat = ThreatModel("l2", float(np.median(cell.rows["l2"])))
    figures = s.success(Attacked.of_cell("linear", "cw_l2", cell, within=threat))
    assert figures["accuracy"] == pytest.approx(1 - fallen(cell, threat).mean()) and 0.2 < figures["asr"] < 0.8


def test_a_targeted_attack_counts_images_that_are_not_at_their_target() -> None:
    figures = s.success(case(targets=np.array([1, 1, 1, 0, 1, 1])))
    assert (figures["hits"], figures["n"]) == (2, 4)  # the third has its label for a target, the last was wrong


def test_draws_and_an_oracle() -> None:
    draws = np.stack([FOUND, [0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]], axis=1)
    figures = s.success(case(draws, oracle=np.array([0, 1, 0, 1, 0, 0])))
    assert (figures["asr"], figures["asr_any"], figures["draws"]) == (3 / 5, 1.0, 3)
    assert figures["oracle_agrees"] == 2 / 3
    assert s.success(case(LABELS, oracle=LABELS))["oracle_agrees"] is None


def test_table_one() -> None:
    table = s.success_table([case(), case(LABELS, attack="b"), case(targets=1 - LABELS)])
    assert {row: list(cells) for row, cells in table.items()} == {"net": ["a", "b"], "net, targeted": ["a"]}
    assert table["net"]["b"]["asr"] == 0.0
    with pytest.raises(UserError, match="attack a is there twice"):
        s.success_table([case(), case()])


def test_the_published_rates_say_of_how_many_images_they_are() -> None:
    content = s.Study({}).as_dict()["published"]
    found = [row["denominators"] for row in content.values()]
    assert found == [[364], [303], [369], [324], [364], [369]]
    assert 324 not in s.denominators([91.12]) and 324 in s.denominators([91.05])
    assert s.denominators([50.0], images=5) == [2, 4]


def test_distances_of_successes_alone() -> None:
    made = case(moved=0.1)
    found = s.measured(made, s.LP)
    steps = np.linspace(0.1, 0.2, 6)[[0, 2, 3]]
    assert found["linf"] == pytest.approx(steps, rel=1e-5) and found["l2"] == pytest.approx(2 * steps, rel=1e-5)
    assert found["mean_abs"] == pytest.approx(steps, rel=1e-5)
    assert len(s.measured(made, s.LP, images=2)["l2"]) == 2
    assert len(s.measured(case(LABELS, moved=0.1), s.LP)["l2"]) == 0
    with pytest.raises(UserError, match="they were not kept"):
        s.measured(case(), s.LP)


def test_histograms_share_their_bins_and_lose_nothing() -> None:
    draw = np.random.default_rng(0)
    near, far = draw.lognormal(0, 1, 500), draw.lognormal(2, 1, 300)
    made = s.histograms(
        {"near": {"l2": near, "linf": near}, "far": {"l2": far, "linf": far}, "none": {"l2": far[:0]}}
    )
    assert made["l2"]["log"] and not made["linf"]["log"] and len(made["l2"]["edges"]) == 41
    low, high = np.percentile(np.concatenate([near, far]), [0.5, 99.5])
    assert made["l2"]["edges"][0] == pytest.approx(low) and made["l2"]["edges"][-1] == pytest.approx(high)
    for attack, values in (("near", near), ("far", far)):
        cell = made["l2"]["attacks"][attack]
        assert cell["n"] == len(values) and sum(cell["density"]) + cell["outside"] == pytest.approx(1)
        assert cell["median"] == pytest.approx(float(np.median(values)))
        counts, _ = np.histogram(values, made["l2"]["edges"])
        assert cell["density"] == pytest.approx((counts / len(values)).tolist())
    assert made["l2"]["attacks"]["none"] == {
        "n": 0, "density": [0.0] * 40, "outside": 0.0, "mean": None, "median": None, "q25": None, "q75": None,
    }  # fmt: skip
    assert not s.histograms({"a": {"l2": np.array([0.0, 1.0])}})["l2"]["log"], "zero has no logarithm"
    same = s.histograms({"a": {"l2": np.full(3, 0.3), "linf": np.full(3, 0.3)}})
    assert all(sum(same[name]["attacks"]["a"]["density"]) == 1 for name in same)


def test_success_within_a_radius() -> None:
    made = case(moved=0.1)
    within = s.success_within(made, s.measured(made, s.LP)["linf"], radii=(0.05, 0.12, 0.5))
    assert [row["asr"] for row in within] == [0.0, 1 / 5, 3 / 5] and {row["n"] for row in within} == {5}
    with pytest.raises(UserError, match="2 distances for 3 successes"):
        s.success_within(made, np.zeros(2))


def test_ablations_and_what_the_loss_adds() -> None:
    made = s.ablation("tau", {0.1: [case(moved=0.2)], 0: [case([1, 0, 1, 1, 0, 1], moved=0.1)]}, s.LP)
    assert [row["value"] for row in made["rows"]] == [0.0, 0.1] and made["option"] == "tau"
    assert [row["excess"] for row in made["rows"]] == [0.0, pytest.approx(2 / 5)]
    assert made["rows"][1]["linf"] == pytest.approx(0.28, rel=1e-5)
    beta = s.ablation("beta", {0.1: [case(), case(attack="b")], 1.0: [case(LABELS)]})
    assert [(row["value"], row["attack"]) for row in beta["rows"]] == [(0.1, "a"), (0.1, "b"), (1.0, "a")]
    assert all("excess" not in row and "linf" not in row for row in beta["rows"])


def test_from_the_ledger(tmp_path: Path) -> None:
    from casemate.attacks.gradient import PGD
    from casemate.threat import ThreatModel

    system = linear()
    data = images(system, n=30, wrong=4)
    cell = Ledger(tmp_path, chunk=10).run(
        system, data, PGD(steps=3), ThreatModel("linf", 0.2), "static", list(range(30)), keep=10
    )
    every = Attacked.of_cell("linear", "pgd", cell)
    assert s.success(every)["n"] == 26 and every.x_adv is None
    kept = Attacked.of_cell("linear", "pgd", cell, lambda indices: data.take(indices)[0].numpy())
    assert kept.x_clean is not None and kept.x_adv is not None and len(kept.labels) == len(kept.x_adv) == 10
    stored, some = cell.x_adv(), np.array([7, 2, 2])
    np.testing.assert_array_equal(kept.x_adv[some], np.stack([stored[int(i)] for i in kept.x_adv.indices[some]]))  # type: ignore[union-attr]
    np.testing.assert_array_equal(kept.x_adv[3], stored[int(kept.x_adv.indices[3])])  # type: ignore[union-attr]
    np.testing.assert_array_equal(kept.x_clean[:], data.take(range(10))[0].numpy())
    assert s.measured(kept, s.LP)["linf"].max() <= 0.2 + 1e-6
    with pytest.raises(UserError, match="no row"):
        Attacked.of_cell("linear", "pgd", cell.at(np.empty(0)))


def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "BLOCK", 8)
    rng, size, chunks = np.random.default_rng(0), 8, 40
    paths = []
    for chunk in range(chunks):
        at = np.arange(chunk * size, (chunk + 1) * size)
        rows = {name: np.zeros(size, kind) for name, kind in segments.COLUMNS.items()}
        rows |= {"index": at, "prediction": np.ones(size, np.int64)}
        paths.append(tmp_path / f"{chunk}.images.parquet")
        segments.write(paths[-1], {}, rows, rng.random((size, 3, 64, 64), np.float32))
    every_byte = size * chunks * 3 * 64 * 64 * 4
    everything = {name: np.zeros(size * chunks, kind) for name, kind in segments.COLUMNS.items()}
    everything |= {"index": np.arange(size * chunks), "prediction": np.ones(size * chunks, np.int64)}
    cell = Cell({}, everything, size * chunks, 3 * 64 * 64, tuple(paths))
    tracemalloc.start()
    found = Attacked.of_cell("net", "noise", cell, lambda indices: np.zeros((len(indices), 3, 64, 64), np.float32))
    few = s.measured(found, s.LP, 20)
    tracemalloc.reset_peak()
    every = s.measured(found, s.LP)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(few["l2"]) == 20 and len(every["l2"]) == size * chunks
    np.testing.assert_array_equal(every["l2"][:20], few["l2"])
    assert peak < 0.25 * every_byte


def test_from_a_file(tmp_path: Path) -> None:
    made, path = case(moved=0.1), tmp_path / "adversarial.npz"
    arrays = {name: getattr(made, name) for name in STORED}
    np.savez(path, **arrays, attack=np.array(list("aabbab")))
    assert Attacked.load(path, "net", "b").labels.tolist() == LABELS[[2, 3, 5]].tolist()
    np.savez(path, **arrays, targets=1 - LABELS)
    read = Attacked.load(path, "net", "a")
    assert s.success(read) == s.success(case(targets=1 - LABELS))
    np.savez(path, labels=LABELS)
    for wrong in (path, tmp_path / "none.npz"):
        with pytest.raises(UserError, match="holds no adversarial images"):
            Attacked.load(wrong, "net", "a")
    with pytest.raises(UserError, match="prediction_adv has 2 rows for 6 labels"):
        case([0, 1])
    with pytest.raises(UserError, match="both the clean and the adversarial"):
        case(x_adv=np.zeros((6, 1, 2, 2)))


def test_the_whole_study_is_written_and_drawn(tmp_path: Path) -> None:
    distances = {**s.LP, "iwd toy": s.mean_abs}
    cases = [
        case(moved=0.01),
        case(attack="b", moved=0.03),
        case(attack="unseen"),
        case(moved=0.02, targets=1 - LABELS),
    ]
    tau = s.ablation("tau", {0: [case(LABELS)], 0.1: [case()], 1: [case([1, 1, 0, 0, 1, 1])]})
    made = s.study(cases, distances, ablations=[tau])
    made.save(tmp_path / "study.json")
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["table"]["net"]["unseen"]["asr"] == 3 / 5 and list(content["figures"]["net"]) == list(distances)
    curve = content["within"]["net"]["b"]["iwd toy"]
    assert [row["asr"] for row in curve] == [0.0, 0.0, 0.0, 1 / 5, 3 / 5]
    assert s.study(cases, distances, images=1).within == {}
    drawn = pictures(tmp_path / "study.json", tmp_path / "out")
    assert [path.name for path in drawn] == ["distances-net.png", "distances-net-targeted.png", "ablation-tau.png"]
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] == 2000 and pixels.min() < 100
    with pytest.raises(UserError, match="is not the JSON of a study"):
        pictures(tmp_path / "none.json", tmp_path)


def test_the_internal_distance_by_protocol() -> None:
    iwd = pytest.importorskip("casemate.iwd")
    distances = s.with_iwd("mnist")
    (name,) = [name for name in distances if name.startswith("iwd")]
    x = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32) / 2
    assert distances[name](x, x + np.float32(0.25)) == pytest.approx(0.25, abs=1e-6)
    assert name == f"iwd {iwd.PROTOCOLS['mnist'][0]}"
    with pytest.raises(UserError, match="no protocol 'nist'"):
        s.with_iwd("nist")


def test_a_distance_is_measured_once_for_the_same_images() -> None:
    calls: list[int] = []

    def distance(x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        return s.linf(x, x_adv)

    known = s.remembered({"a": distance})
    first, again, other = (s.measured(case(moved=m), known)["a"] for m in (0.1, 0.1, 0.2))
    assert calls == [3, 3] and np.array_equal(first, again) and not np.array_equal(first, other)
