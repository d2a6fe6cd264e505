"""The leaderboard's rules, and the page: self-contained, escaped, reproducible, readable on a phone."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_reporting_samples import (
    HOLDS,
    SEEMS,
    dump,
    evaluation,
    rate,
    release,
    rows,
    system,
    write_images,
    write_profile,
)

from casemate.errors import UserError
from casemate.reporting import Leaderboard, ReportInputs, build, champion, words, write_overview, write_report
from casemate.reporting.gallery import gallery, pick
from casemate.reporting.heatmap import heat_map
from casemate.reporting.theme import PLACEHOLDERS

CHROMIUM = shutil.which("chromium")


def board(tmp_path: Path, *found: dict[str, Any]) -> Leaderboard:
    for one in found:
        dump(tmp_path / f"evaluate/{one['row']}.json", one)
    return build(ReportInputs.load("mnist", tmp_path, tmp_path, [one["row"] for one in found]))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of the sample profile, and a scaled-down one beside it; returns the folder of both."""
    root = tmp_path_factory.mktemp("reporting")
    write_report(write_profile(root, rows()), root / "reports/mnist")
    small = write_profile(root, [rows()[1] | {"budget": 0.1}], "quick")
    write_report(small, root / "reports/quick")
    return root / "reports"


@pytest.fixture(scope="module")
def page(reports: Path) -> str:
    return (reports / "mnist/index.html").read_text()


def test_words_on_a_row_stand_in_its_article(tmp_path: Path) -> None:
    inputs = replace(write_profile(tmp_path, rows()), notes={"trades": "A network of half the width & no more."})
    page = write_report(inputs, tmp_path / "reports/mnist").read_text()
    articles = re.findall(r'<article class="panel row" id="row-(\w+)".*?</article>', page, re.DOTALL)
    assert "trades" in articles and page.count("half the width &amp; no more.") == 1
    assert "half the width" in page[page.index('id="row-trades"') :].split("</article>")[0]


# --- the leaderboard ------------------------------------------------------------------------------------------


def test_systems_are_ranked_by_the_adaptive_worst_case_and_the_doubtful_are_not(tmp_path: Path) -> None:
    found = board(tmp_path, *rows())
    assert [(e.rank, e.system) for e in found.ranked] == [
        (1, "trades"), (2, "at_pgd"), (3, "atld+off"), (4, "atld"), (5, "atld+limited"), (6, "standard"),
    ]  # fmt: skip
    assert [(e.system, e.status) for e in found.unranked] == [
        ("brief", "untrained"), ("opaque", "not evaluated"), ("half", "incomplete"), ("masked", "unreliable"),
    ]  # fmt: skip


def test_a_tie_over_all_attacks_is_settled_by_the_core_suite(tmp_path: Path) -> None:
    first, second = (evaluation(name, [system(name, "plain", 0.98, HOLDS)]) for name in "ab")
    second["systems"][0]["worst"]["core"]["adaptive"]["accuracy"] = 0.95
    assert [e.system for e in board(tmp_path, first, second).ranked] == ["b", "a"]


def test_the_gravest_reason_is_given(tmp_path: Path) -> None:
    doubtful = system("x", "plain", 0.98, HOLDS, verdict="unreliable", incomplete=["fgsm"])
    both = evaluation("x", [doubtful], untrained=True)
    assert board(tmp_path, both).entries[0].status == "untrained"
    assert board(tmp_path, both | {"untrained": False}).entries[0].status == "incomplete"


def test_the_figures_of_an_entry(tmp_path: Path) -> None:
    entry = next(e for e in board(tmp_path, *rows()).entries if e.system == "atld")
    assert (entry.clean, entry.clean_n) == (0.9789, 10_000)
    assert (entry.worst_all, entry.worst_all_n, entry.worst_core) == (0.208, 1_000, 0.239)
    assert (entry.published, entry.published_attack, entry.published_n) == (0.722, "pgd40_restarts5 (static)", 1_000)
    assert (entry.static_verdict, entry.gap) == ("unreliable", 0.514)
    assert (entry.strongest_attack, entry.attacks) == ("pgd40_restarts5", 16)  # pgd_l2 is under another threat model
    assert (entry.forwards, entry.backwards) == (1298, 1282)  # the sums of the attacks' means, on both faces
    assert (entry.epochs, entry.train_seed, entry.budget) == (12, 0, 1.0)


def test_a_row_below_its_floor_has_failed_and_says_why(tmp_path: Path) -> None:
    found = rows()
    for one, accuracy in ((found[1], 0.75), (found[2], 0.95), (found[4], 0.8), (found[5], 0.93)):
        one["floors"] = [{"suite": "core", "accuracy": accuracy}]
    ranked = board(tmp_path, *found)
    said = {e.system: (e.status, e.reason, e.rank) for e in ranked.entries}
    reason = "keeps 92.8 % of 10,000 images under the suite core, and its floor is 95 %"
    assert said["trades"] == ("failed", reason, None)
    assert said["at_pgd"] == ("ranked", None, 1) and champion(ranked).system == "at_pgd"  # type: ignore[union-attr]
    assert said["masked"][0] == "failed"  # a doubtful figure can only be too high
    assert said["half"][0] == "failed"
    assert words.finding(board(tmp_path, found[2])) == "No system can be ranked: trades failed its floor."
    page = write_report(write_profile(tmp_path, found[1:3]), tmp_path / "out").read_text().replace("<wbr>", "")
    assert page.count(reason.replace(" %", "%")) == 2 and '<span class="chip bad">failed</span>' in page


def test_the_papers_protocol_is_one_attack_and_no_union(tmp_path: Path) -> None:
    """Sixteen blind attacks together leave next to nothing, and would hide that the best of them leaves 72 %."""
    one = rows()[3]
    imt = one["systems"][0]
    imt["worst"]["all"]["static"] = imt["worst"]["all"]["published"] = rate(0.01, 256)
    entry = next(e for e in board(tmp_path, one).entries if e.system == "atld")
    assert (entry.published, entry.gap) == (0.722, 0.514)
    assert "seems to keep 72.2%" in words.remarks(Leaderboard("mnist", (entry,)))[-1]
    own = imt["cells"][4] | {"attack": "table5", "protocol": "published", **rate(0.139, 1_000)}  # the paper's own
    imt["cells"].append(own)
    atld = next(e for e in board(tmp_path, one).entries if e.system == "atld")
    assert (atld.published, atld.published_attack, atld.static_verdict) == (0.139, "table5", "unreliable")
    assert atld.worst_all == 0.208 and atld.rank is not None  # what is ranked is adaptive, and not in doubt
    plain = board(tmp_path, rows()[1]).entries[0]
    assert (plain.published, plain.published_attack, plain.gap) == (None, None, None)


def test_the_champion_is_the_best_whose_gate_says_ok(tmp_path: Path) -> None:
    found = rows()
    found[2]["systems"][0]["gate"] = {"verdict": "not run", "checks": []}  # trades, ranked first
    ranked = board(tmp_path, *found)
    best = champion(ranked)
    assert ranked.ranked[0].system == "trades" and best is not None and best.system == "at_pgd"
    assert [e.system for e in ranked.entries if e.champion] == ["at_pgd"]
    assert champion(board(tmp_path, *rows()[4:])) is None


def test_validation_images_choose_the_champion_and_test_images_rank(tmp_path: Path) -> None:
    found = rows()
    for one in found:
        for made in one["systems"]:
            kept = 0.93 if made["name"] == "at_pgd" else 0.91 if made["name"] == "trades" else 0.5
            made["selection"] = {"suite": "core", **rate(kept, 2_000)}
    chosen = board(tmp_path, *found)
    best = champion(chosen)
    assert best is not None and (best.system, best.rank, best.selection) == ("at_pgd", 2, 0.93) and best.champion
    assert words.finding(chosen).startswith("at_pgd, the best on 2,000 validation images, is number 2 here: it ")
    assert any("keeps 93.0%: no test image had a say" in line for line in words.remarks(chosen))
    page = write_report(write_profile(tmp_path, found), tmp_path / "out").read_text()
    assert "no test image had a say" in page
    stored = json.loads((tmp_path / "out/leaderboard.json").read_text())
    assert stored["champion"] == "at_pgd"
    del found[0]["systems"][0]["selection"]  # one of them was not judged there: the ranking has to choose
    assert champion(board(tmp_path, *found)).system == "trades"  # type: ignore[union-attr]


def test_of_equals_on_validation_images_one_that_can_be_served_is_champion(tmp_path: Path) -> None:
    found = rows()
    for one in found:
        for made in one["systems"]:
            kept = 0.93 if made["name"] in ("at_pgd", "trades") else 0.5
            made["selection"] = {"suite": "core", **rate(kept, 2_000)}
    assert champion(board(tmp_path, *found)).system == "trades"  # type: ignore[union-attr]
    dump(tmp_path / "release/at_pgd.json", release(0.92, passed=True))
    assert champion(board(tmp_path, *found)).system == "at_pgd"  # type: ignore[union-attr]


def test_a_file_that_fails_the_release_gate_is_no_champion(tmp_path: Path) -> None:
    found = rows()
    assert champion(board(tmp_path, *found)).system == "trades"  # type: ignore[union-attr]
    dump(tmp_path / "release/trades.json", release(0.90, passed=False))
    dump(tmp_path / "release/at_pgd.json", release(0.92, passed=True))
    after = board(tmp_path, *found)
    assert champion(after).system == "at_pgd"  # type: ignore[union-attr]
    said = {e.system: (e.release, e.served) for e in after.entries}
    assert said["trades"] == ("failed", 0.9) and said["at_pgd"] == ("passed", 0.92)
    assert said["standard"] == ("not run", None)
    assert [e.system for e in after.entries if e.champion] == ["at_pgd"]


def test_rows_of_different_threat_models_do_not_share_a_ranking(tmp_path: Path) -> None:
    other = rows()[2] | {"threat": {"norm": "l2", "radius": 1.5, "text": "l2 1.5"}}
    with pytest.raises(UserError, match=r"at_pgd: mnist, linf 0.3; trades: mnist, l2 1.5"):
        board(tmp_path, rows()[1], other)


def test_csv_and_json_agree_and_read_back(reports: Path) -> None:
    stored = json.loads((reports / "mnist/leaderboard.json").read_text())
    with (reports / "mnist/leaderboard.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert stored["champion"] == "trades" and len(table) == len(stored["rows"]) == 10
    for line, row in zip(table, stored["rows"], strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}
    again = Leaderboard.read(reports / "mnist/leaderboard.json")
    assert stored["figures"]["atld"] == {
        "clean": 0.9789,
        "worst_core": 0.239,
        "worst_all": 0.208,
        "published": 0.722,
    }
    assert again.json() == (reports / "mnist/leaderboard.json").read_text()


def test_the_finding_states_its_conditions(tmp_path: Path) -> None:
    said = words.finding(board(tmp_path, *rows()))
    assert said == (
        "trades holds best: it classifies 92.5% of MNIST test images correctly under the worst of 8 attacks "
        "at ℓ∞ radius 0.3 (95% interval 90.7 to 94.0, n\u00a0=\u00a01,000) and 98.5% without attack, "
        "in one training run (seed 0) at full budget."
    )
    overlap, choice, gap = words.remarks(board(tmp_path, *rows()))
    assert choice.startswith("trades was chosen as the best of 5 by these very images")
    assert "overlaps that of at_pgd" in overlap and gap.startswith("atld+limited seems to keep 73.2%")
    assert words.finding(board(tmp_path, rows()[4])) == "No system can be ranked: masked is judged unreliable."
    assert words.finding(board(tmp_path, rows()[0])).startswith("No system holds: the best of them, standard,")


def test_a_suite_that_leaves_fewer_of_more_images_is_told(tmp_path: Path) -> None:
    one = rows()[2]
    made = one["systems"][0]
    made["worst"]["core"]["adaptive"] = made["worst"]["core"]["adaptive"] | rate(0.892, 500)
    made["worst"]["extended"]["adaptive"] = made["worst"]["extended"]["adaptive"] | rate(0.1, 1_000)  # has an l2 ball
    (entry,) = board(tmp_path, one).entries
    assert (entry.least_suite, entry.least, entry.least_n) == ("core", 0.892, 500)
    (said,) = words.remarks(Leaderboard("mnist", (entry,)))
    assert said.startswith(
        f"The suite core alone leaves {entry.system} 89.2% of 500 images (95% interval 86.2 to 91.6"
    )
    made["worst"]["core"]["adaptive"] |= rate(0.99, 500)
    assert words.remarks(board(tmp_path, one)) == []


def test_figures_in_words() -> None:
    assert [words.percent(v) for v in (None, 0.0, 0.92345, 1.0)] == ["–", "0.0", "92.3", "100.0"]
    assert [words.points(v) for v in (None, 0.5, -0.0123, 0.0)] == ["–", "+50.0", "−1.2", "0.0"]
    assert [words.count(v) for v in (None, 10_000, 12.34, 3.0)] == ["–", "10,000", "12.3", "3"]
    assert words.threat("linf 8/255") == "ℓ∞ radius 8/255"


def test_the_heat_map_puts_adaptive_and_static_side_by_side(tmp_path: Path) -> None:
    inputs = write_profile(tmp_path, rows()[:4])
    heat = heat_map(inputs, build(inputs).entries)
    assert [(g.system, g.faces) for g in heat.groups][3] == ("atld", ("adaptive", "static"))
    by_attack = {line.attack: [c and c.accuracy for c in line.cells] for line in heat.lines}
    #                              trades at_pgd +off   atld, its static   +limited, its static  standard
    assert by_attack["pgd100_ce"] == pytest.approx([0.934, 0.931, 0.281, 0.251, 0.752, 0.231, 0.762, 0.0])
    assert list(by_attack)[-1] == "worst case" and by_attack["worst case"][3:5] == [0.208, None]
    assert {line.attack: line.sizes for line in heat.lines}["mim40"] == (1_000,)
    assert {line.attack: line.threat for line in heat.lines if line.threat} == {"pgd_l2": "l2 2"}


# --- the page -------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?:|@import|<script|<link|<iframe|srcset", page)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert addresses and all(re.match(r"#|data:image/png;base64,|leaderboard\.(csv|json)$", a) for a in addresses)
    assert "default-src 'none'" in page


def test_every_link_inside_the_page_has_its_place_and_no_identifier_is_used_twice(page: str) -> None:
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(identifiers)


def test_the_page_fits_phones_and_both_colour_schemes(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page and "tabular-nums" in page
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 3
    assert not any(placeholder in page for placeholder in PLACEHOLDERS.values())


def test_the_page_tells_what_is_known_of_each_system(page: str) -> None:
    for text in ("Not ranked", "not evaluated", "+51.4", "90.7 – 94.0", "no adaptive attack on it has been run",
                 "cw_margin not finished", "8.6e-07", "recipe.lr", "3d1c07aa51e9f204", "more steps do not hurt",
                 "purified", "9f3a61c2d07be845"):  # fmt: skip
        assert text in page.replace("<wbr>", ""), text
    assert "Scaled-down run" not in page


def test_the_page_says_where_a_limited_form_never_acts(tmp_path: Path) -> None:
    one = rows()[3]
    for system_, inside in zip(one["systems"], (0, 5), strict=False):
        system_["band"] = {"low": 0.3, "high": 0.7, "inside": inside, "n": 256, "lowest": 0.013, "highest": 0.275}
    text = write_report(write_profile(tmp_path, [one]), tmp_path / "out").read_text()
    assert "score of 0 of 256 clean images (0.0%) lies inside the band (0.3, 0.7)" in text
    assert "score of 5 of 256 clean images (2.0%)" in text and "between 0.013 and 0.275" in text
    assert text.count("the full form under another name") == 1


def test_the_page_says_what_an_attack_warned_of(tmp_path: Path) -> None:
    one = rows()[0]
    one["systems"][0]["cells"][0]["remarks"] = ["gradients are masked", "logits are probabilities"]
    text = write_report(write_profile(tmp_path, [one]), tmp_path / "out").read_text()
    assert text.count("by themselves: gradients are masked; logits are probabilities.") == 1


def test_the_page_tells_the_curvature_where_it_is_known(tmp_path: Path) -> None:
    one, other = rows()[:2]
    one["systems"][0]["curvature"], other["systems"][0]["curvature"] = {"median": 0.0123, "mean": 4.5, "n": 197}, None
    text = write_report(write_profile(tmp_path, [one, other]), tmp_path / "out").read_text()
    assert text.count("<b>0.0123</b>") == 1 == text.count("mean 4.5, n&nbsp;=&nbsp;197")


def test_a_scaled_down_run_says_so(reports: Path) -> None:
    assert "cut to 0.1 of the full settings" in (reports / "quick/index.html").read_text()


class Tags(HTMLParser):
    """The (tag, attribute) pairs of a page, as a browser would read it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs}

    @classmethod
    def of(cls, text: str) -> set[tuple[str, str]]:
        reader = cls()
        reader.feed(text)
        return reader.found


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="a">$\\frac&'
    one = evaluation("x", [system("x", evil, 0.98, HOLDS, SEEMS)], method=evil, network=evil, classes=[evil] * 10)
    one["card"][evil] = evil
    one["systems"][0] |= {"name": evil}
    one["systems"][0]["cells"][0] |= {"attack": evil, "remarks": [evil]}
    one["systems"][0]["gate"]["checks"][0] |= {"name": evil, "detail": evil}
    text = write_report(write_profile(tmp_path, [one]), tmp_path / "out").read_text()
    write_overview(tmp_path)
    for shown in (text, (tmp_path / "index.html").read_text()):
        assert shown.replace("<wbr>", "").count("&lt;img src=x") >= 4
        assert not any(attribute == "onerror" for _, attribute in Tags.of(shown))
    assert ("img", "alt") in Tags.of(text)


def test_equal_inputs_give_equal_bytes(reports: Path, tmp_path: Path) -> None:
    inputs = write_profile(tmp_path, [rows()[1] | {"budget": 0.1}], "quick")
    write_report(inputs, tmp_path / "out")
    names = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {"index.html", "gallery_at_pgd.png", "leaderboard.png", "leaderboard.csv"} <= {p.name for p in names}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (reports / "quick" / name).read_bytes(), name
    for picture in (tmp_path / "out").rglob("*.png"):
        with Image.open(picture) as opened:
            assert not {"Software", "Creation Time", "date"} & set(opened.info)


def test_an_evaluation_alone_makes_a_report_and_old_plots_go(tmp_path: Path) -> None:
    bare = rows()[1]
    bare["systems"][0] |= {"sweep": None, "cells": []}
    dump(tmp_path / "evaluate/at_pgd.json", bare)
    write_images(tmp_path / "evaluated/at_pgd/adversarial.npz", purified=False, seed=0)
    write_report(ReportInputs.load("mnist", tmp_path, tmp_path), tmp_path)
    assert (tmp_path / "plots/gallery_at_pgd.png").exists()
    shutil.rmtree(tmp_path / "evaluated")
    text = write_report(ReportInputs.load("mnist", tmp_path, tmp_path), tmp_path).read_text()
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["worst_case.png"]
    assert "<h3>Images" not in text and 'id="training"' not in text and 'id="attacks"' not in text


def test_the_overview_shows_every_profile_the_default_one_first(reports: Path) -> None:
    text = write_overview(reports).read_text()
    assert [m.start() for m in re.finditer(r'id="profile-(mnist|quick)"', text)] == sorted(
        [text.index('id="profile-mnist"'), text.index('id="profile-quick"')]
    )
    assert 'href="quick/index.html#system-at-5f-pgd"' in text and "budget 0.1: not comparable" in text
    assert not re.search(r"https?:|<script|<link", text) and '<svg class="narrow"' in text
    assert 'id="system-at-5f-pgd"' in (reports / "quick/index.html").read_text()
    assert write_overview(reports, default="quick").read_text().index("quick") < text.index("quick")
    with pytest.raises(UserError, match="holds no leaderboard"):
        write_overview(reports / "mnist")


# --- images ---------------------------------------------------------------------------------------------------


def test_the_first_image_of_each_class_is_shown() -> None:
    assert pick(np.array([3, 3, 1, 0, 3, 1]), shown=4) == [3, 2, 0, 1]
    assert len(pick(np.arange(100))) == 10


def test_a_gallery_in_colour_with_named_classes_and_rejections(tmp_path: Path) -> None:
    path = tmp_path / "adversarial.npz"
    x = np.full((2, 3, 4, 4), 0.5, np.float32)
    labels = {"indices": [7, 9], "labels": [1, 0], "prediction_clean": [1, 1], "prediction_adv": [-1, 0]}
    np.savez(path, x_clean=x, x_adv=x + 0.25, **labels)
    found = gallery(path, ("cat", "dog"), 0.5)
    assert found is not None and found.kinds == ("clean", "adversarial", "difference") and found.scale == 0.5
    cat, dog = found.samples
    assert (cat.index, cat.label, cat.prediction_clean) == (9, "cat", "dog")
    assert (cat.clean_right, cat.adv_right) == (False, True)
    assert (dog.prediction_adv, dog.adv_right) == ("rejected", False)
    np.testing.assert_allclose(found.images["difference"], 0.75)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "adversarial.npz"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"adversarial.npz cannot be read"):
        gallery(path, (), 0.3)
    np.savez(path, labels=np.zeros(1))
    with pytest.raises(UserError, match="has no indices"):
        gallery(path, (), 0.3)
    np.savez(path)
    assert gallery(path, (), 0.3) is None


# --- the whole ------------------------------------------------------------------------------------------------


def test_the_report_needs_no_torch() -> None:
    code = "import sys, casemate.reporting; assert not {'torch', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_no_page_is_wider_than_a_phone(reports: Path, tmp_path: Path) -> None:
    """Laid out by a browser in a frame of 390 pixels: only the tables scroll, not the page."""
    assert CHROMIUM is not None
    write_overview(reports)
    measure = "[...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth)"
    pages = ("index.html", "mnist/index.html")
    frames = "".join(f'<iframe width="390" style="border:0" src="{p}"></iframe>' for p in pages)
    (reports / "frame.html").write_text(f'<body onload="document.title={measure}.join()">{frames}</body>')
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--allow-file-access-from-files", "--hide-scrollbars",
        f"--user-data-dir={tmp_path}",
    ]  # fmt: skip
    address = (reports / "frame.html").as_uri()
    shown = subprocess.run([CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert "<title>390,390</title>" in shown.stdout
