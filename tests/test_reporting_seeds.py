"""Several training seeds of one profile: the worst of them counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from test_reporting_samples import HOLDS, evaluation, rows, system, write_profile

from casemate.reporting import Leaderboard, write_overview, write_report
from casemate.reporting.seeds import base_of, over_seeds


def seeded(root: Path, name: str, seed: int, clean: float) -> Leaderboard:
    found = [evaluation("at_pgd", [system("at_pgd", "plain", clean, HOLDS)])]
    found[0]["card"] = {**found[0]["card"], "seed": seed}
    if seed == 0:
        found.append(evaluation("alone", [system("alone", "plain", clean, HOLDS)]))
    write_report(write_profile(root, found, name), root / "reports" / name)
    return Leaderboard.read(root / "reports" / name / "leaderboard.json")


def test_a_name_says_its_seed() -> None:
    assert [base_of(n) for n in ("mnist_study", "mnist_study_s2", "mnist_s")] == [
        "mnist_study",
        "mnist_study",
        "mnist_s",
    ]


def test_the_worst_seed_the_mean_and_the_best(tmp_path: Path) -> None:
    boards = [
        seeded(tmp_path, "study", 0, 0.98),
        seeded(tmp_path, "study_s1", 1, 0.9),
        seeded(tmp_path, "other", 0, 0.5),
    ]
    found = over_seeds(boards)
    assert list(found) == ["study"]
    (only,) = found["study"]  # "alone" has one seed
    assert (only.system, only.seeds, only.statuses) == ("at_pgd", (0, 1), ("ranked", "ranked"))
    assert only.clean is not None and (only.clean.worst, only.clean.best) == (0.9, 0.98)
    assert abs(only.clean.mean - 0.94) < 1e-9
    page = write_overview(tmp_path / "reports").read_text()
    assert page.count("Over training seeds") == 1 and "mean 94.0" in page and "0, 1" in page


def test_a_group_without_its_first_profile_is_shown_under_its_first_seed(tmp_path: Path) -> None:
    boards = [seeded(tmp_path, "study_s1", 1, 0.9), seeded(tmp_path, "study_s2", 2, 0.8)]
    assert list(over_seeds(boards)) == ["study_s1"]
    assert "Over training seeds" in write_overview(tmp_path / "reports").read_text()


def test_a_figure_that_a_seed_lacks_is_not_given_and_a_doubtful_seed_is_named(tmp_path: Path) -> None:
    sample = write_profile(tmp_path, rows(), "sample")
    write_report(sample, tmp_path / "reports/sample")
    entries = Leaderboard.read(tmp_path / "reports/sample/leaderboard.json").entries
    opaque, whole = (next(e for e in entries if e.system == s) for s in ("opaque", "at_pgd"))
    first, second = Leaderboard("a", (whole,)), Leaderboard("a_s1", (dataclasses.replace(opaque, system="at_pgd"),))
    (found,) = over_seeds([first, second])["a"]
    assert found.every is None and "not evaluated" in found.statuses
