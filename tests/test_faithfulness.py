"""The page of published figures: every method is on it, and it shows what the committed reports say."""

import json
import subprocess

import pytest
import yaml
from project import ROOT

from casemate.registry import names
from casemate.reporting.faithfulness import Published, _row, page, published

PAGE = ROOT / "docs" / "faithfulness.md"


@pytest.mark.parametrize("kind", ["defense", "detector"])
def test_what_is_described_is_registered(kind):
    assert set(published()[f"{kind}s"]) <= set(names(kind))


def test_a_method_without_published_figures_is_on_the_page(monkeypatch):
    monkeypatch.setattr("casemate.reporting.faithfulness.names", lambda kind: ["at_pgd", "quite_new"])
    monkeypatch.chdir(ROOT)
    assert "### quite_new (`quite_new`)\n\nNot in a committed report.\n" in page(ROOT / "reports")


def test_a_published_figure_keeps_its_place():
    found = published()["defenses"]["l2l_da"].published[0]
    assert (found.data, found.threat, found.clean, found.robust) == ("mnist", "linf 0.3", 98.47, 94.61)


def test_ours_come_from_the_leaderboard(monkeypatch):
    monkeypatch.chdir(ROOT)
    board = json.loads((ROOT / "reports" / "mnist" / "leaderboard.json").read_text())["rows"]
    shown = page(ROOT / "reports")
    for row in board:
        line = next(line for line in shown.splitlines() if f"`mnist` {row['system']} |" in line)
        assert f"**{100 * row['worst_core']:.2f}** (n {row['worst_core_n']:,})" in line


def test_the_page_is_that_of_the_committed_reports(monkeypatch):
    command = ["git", "status", "--porcelain", "--", "reports"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if changed.returncode != 0 or changed.stdout:
        pytest.skip("the reports here are not those that are committed")
    monkeypatch.chdir(ROOT)
    assert PAGE.read_text() == page(ROOT / "reports"), "run: python -m pipeline faithfulness"


def test_both_figures_of_a_model_are_said_to_be_of_that_model():
    small = [p for p in published()["defenses"]["bilateral"].published if p.clean == 92.8]
    assert len(small) == 2 and all("trained at 4/255" in p.where for p in small)


def test_detectors_have_both_figures_of_every_pair_of_attacks():
    attacks = ("FGSM", "PGD", "C&W")
    of = {f"fitted to {a}" if a == b else f"fitted to {a} and tested on {b}" for a in attacks for b in attacks}
    for about in published()["detectors"].values():
        for where in {p.where for p in about.published}:
            found = [p.protocol for p in about.published if p.where == where]
            assert sorted(found) == sorted(f"{what} {pair}" for what in ("ACC-NADV", "ACC-COM") for pair in of)


def test_rates_are_rates():
    raw = yaml.safe_load((ROOT / "src" / "casemate" / "published.yaml").read_text())
    for methods in raw.values():
        for about in methods.values():
            assert all(0 <= row[5] <= 100 and (row[4] is None or 0 <= row[4] <= 100) for row in about["published"])


RECALLED = {
    ("n_fgsm", "cifar10", 80.6, 48.1),
    ("lat", "cifar100", None, 27.03),
    ("lat", "svhn", None, 60.23),
    ("lat", "mnist", None, 94.2),
    ("defense_gan", "mnist", 99.0, 98.8),
}
"""(method, data set, clean, robust) of the figures that were repeated from general knowledge."""


def test_the_marks_are_on_the_figures_that_nobody_looked_up():
    every = [(name, p) for kind in published().values() for name, about in kind.items() for p in about.published]
    marked = [(name, p.data, p.clean, p.robust) for name, p in every if p.unverified]
    assert len(marked) == len(set(marked)) and set(marked) == RECALLED


def test_a_figure_that_nobody_looked_up_says_so_on_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    marked = [p for about in published()["defenses"].values() for p in about.published if p.unverified]
    shown = page(ROOT / "reports")
    assert marked and len(marked) == shown.count("*(unverified)* |")
    assert all(f"| {p.where} *(unverified)* | {p.data} |" in shown for p in marked)


def test_a_mark_that_is_none_is_refused():
    good = ["here", "mnist", "-", "linf 0.3", 99.0, 90.0, "PGD"]
    assert not _row(good)["unverified"] and _row([*good, "unverified"])["unverified"]
    for bad in (good[:-1], [*good, "sure"], [*good, "unverified", "unverified"]):
        with pytest.raises(ValueError):
            Published.model_validate(_row(bad))
