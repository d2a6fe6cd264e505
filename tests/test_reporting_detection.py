"""The section "Detectors" of the page: what it shows, in which order, and that it goes where there is nothing."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_reporting_samples import dump, rows, write_profile

from casemate.errors import UserError
from casemate.reporting import ReportInputs, write_report

FIGURES = (
    "acc_adv",
    "acc_nadv",
    "acc_cla",
    "acc_com",
    "system_natural",
    "noisy_false_alarms",
    "auroc",
    "tpr_at_5_fpr",
)


def judged(
    detector: str, fitted_on: str, tested_on: str, threshold: str, scope: str, *, own: str, sd: bool
) -> dict[str, Any]:
    familiar = fitted_on == tested_on
    base = (0.9 if familiar else 0.55) - (0.1 if threshold != own else 0) - (0.05 if scope == "successes" else 0)
    values = {"acc_adv": base, "acc_nadv": 0.95, "acc_cla": None if base > 0.85 else 0.125, "acc_com": base + 0.0123}
    values |= {"system_natural": 0.9412, "noisy_false_alarms": 0.1, "auroc": base + 0.05, "tpr_at_5_fpr": base - 0.1}
    deviations = {f"{name}_sd": None if values[name] is None else 0.0173 for name in FIGURES}
    return {
        "detector": detector, "fitted_on": fitted_on, "tested_on": tested_on, "familiar": familiar,
        "threshold": threshold, "own": threshold == own, "scope": scope, **values,
        "n_adversarial": 800 if scope == "all" else 731, "n_natural": 800, **(deviations if sd else {}),
    }  # fmt: skip


def detection(row: str, detectors: dict[str, str], attacks: tuple[str, ...], *, splits: int = 1) -> dict[str, Any]:
    """`detect/ROW.json`; `detectors` by name, with the threshold each uses."""
    threats = {name: "l2 2" if name == "cw_l2" else "linf 0.3" for name in attacks}
    found = []
    for (name, own), fitted_on, tested_on in product(detectors.items(), reversed(attacks), attacks):
        for threshold, scope in product(sorted({"half", own}), ("all", "successes")):
            found.append(judged(name, fitted_on, tested_on, threshold, scope, own=own, sd=splits > 1))
    joint = [
        {"detector": d, "fitted_on": a, "attack": "joint", "threat": t, "n": 120, "natural": 0.9083, "evaded": 0.95,
         "accuracy": 0.0417, "rejected": 0.0083}
        for d, a, t in product(detectors, attacks, dict.fromkeys(threats.values())) if d != "lid"
    ]  # fmt: skip
    return {
        "schema": 1, "profile": "mnist", "row": row, "method": row, "network": "lenet5", "dataset": "mnist",
        "budget": 1.0, "detectors": {name: {"method": "kd", "options": {}} for name in detectors},
        "stored": {"fitted_on": attacks[0], "natural": 2000, "detectors": [d for d in detectors if d != "lid"]},
        "set_1": 200, "set_2": 800, "splits": splits, "seed": 0, "rows": found, "adaptive": joint,
        "attacks": [
            {"attack": name, "threat": threats[name], "n": 1000, "clean": 0.991, "accuracy": 0.0312, "l2_mean": 5.43,
             "l2_per_pixel": 0.007} for name in attacks
        ],
    }  # fmt: skip


def write_detections(reports: Path) -> None:
    found = [
        detection("standard", {"kd": "validation", "lid": "half"}, ("fgsm", "pgd", "cw_l2")),
        detection("er", {"er1": "validation"}, ("fgsm", "pgd"), splits=3),
    ]
    dump(reports / "detect/index.json", [one["row"] for one in found])
    for one in found:
        dump(reports / f"detect/{one['row']}.json", one)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("detectors")
    write_profile(root, rows()[:2])
    write_detections(root / "reports/mnist")
    inputs = ReportInputs.load("mnist", root / "reports/mnist", root / "models/mnist", ["standard", "at_pgd"])
    return write_report(inputs, root / "reports/mnist").read_text()


def cells(text: str) -> list[str]:
    """The words of a piece of the page, without its tags."""
    return [
        word for part in re.sub(r"<[^>]+>", "\n", text.replace("<wbr>", "")).split("\n") if (word := part.strip())
    ]


def article(page: str, row: str) -> str:
    return page[page.index(f'id="detectors-{row}"') :].split("</article>")[0]


def test_each_victim_has_a_table_with_its_figures(page: str) -> None:
    assert '<a href="#detectors">Detectors</a>' in page and page.count('<section id="detectors">') == 1
    shown = article(page, "standard")
    first = re.findall(r"<tr.*?</tr>", shown.split("</thead>")[1], re.DOTALL)[0]
    assert cells(first) == [
        "kd", "on cw_l2", "cw_l2", "familiar", "90.0", "95.0", "–", "91.2", "94.1", "10.0", "95.0", "80.0",
        "800 / 800", "4.2", "of 90.8, 0.8 rejected", "ℓ∞ radius 0.3", "n&nbsp;=&nbsp;120",
        "4.2", "of 90.8, 0.8 rejected", "ℓ2 radius 2", "n&nbsp;=&nbsp;120",
    ]  # fmt: skip
    assert "Set I 200 images, set II 800." in shown and "on 2,000 validation images: kd." in shown
    assert {"fgsm", "99.1", "3.1", "5.43", "1,000"} <= set(cells(shown.split("on the classifier alone")[1]))


def test_familiar_comes_first_and_cross_is_marked(page: str) -> None:
    table = article(page, "standard").split("</table>")[0]
    for body in re.findall(r"<tbody>(.*?)</tbody>", table, re.DOTALL):
        assert re.findall(r'<tr class="(\w+)">', body) == ["familiar", "cross", "cross"]
        assert body.count(">familiar</span>") == 1 and body.count(">cross</span>") == 2
        fitted = re.search(r"<small>on (\w+)</small>", body)
        assert fitted is not None and cells(body.split("familiar</span>")[0])[2] == fitted[1]


def test_the_main_table_is_at_the_detectors_own_threshold_and_the_rest_is_folded(page: str) -> None:
    shown = article(page, "standard")
    main, folded = shown.split("<details>")
    # Two detectors, three attacks to fit to and three to test on; "kd" has a second threshold, both a second count.
    assert main.split("</table>")[0].count('scope="rowgroup"') == 2 * 3
    assert len(re.findall(r'<tr class="(?:familiar|cross)">', main)) == 2 * 9
    assert len(re.findall(r'<tr class="(?:familiar|cross)">', folded)) == 9 * 3 + 9
    assert "731" not in main and "731" in folded
    assert "kd by the false alarms on set I; lid probability ½" in " ".join(cells(folded))


def test_where_the_joint_attack_was_not_run_it_says_so(page: str) -> None:
    lid = next(b for b in re.findall(r"<tbody>(.*?)</tbody>", article(page, "standard"), re.DOTALL) if "lid" in b)
    assert "not run" in lid and "ℓ∞" not in lid


def test_splits_bring_deviations(page: str) -> None:
    assert "mean ± deviation over 3 such splits" in article(page, "er") and "± 1.7" in article(page, "er")
    assert "±" not in article(page, "standard")


def test_no_identifier_is_used_twice(page: str) -> None:
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(identifiers)


@pytest.mark.parametrize("index", [None, []])
def test_without_detectors_there_is_no_section(tmp_path: Path, index: list[str] | None) -> None:
    write_profile(tmp_path, rows()[:1])
    reports = tmp_path / "reports/mnist"
    if index is not None:
        write_detections(reports)  # of rows that are gone
        dump(reports / "detect/index.json", index)
    inputs = ReportInputs.load("mnist", reports, tmp_path / "models/mnist")
    assert inputs.detections == ()
    text = write_report(inputs, tmp_path / "out").read_text()
    assert 'id="detectors"' not in text and "#detectors" not in text


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_profile(tmp_path, rows()[:1])
    reports = tmp_path / "reports/mnist"
    dump(reports / "detect/index.json", ["standard"])
    with pytest.raises(UserError, match=r"detect/standard.json does not exist"):
        ReportInputs.load("mnist", reports, tmp_path)
    dump(reports / "detect/standard.json", {"row": "standard"})
    with pytest.raises(UserError, match=r"detect/standard.json: method: Field required"):
        ReportInputs.load("mnist", reports, tmp_path)
    dump(reports / "detect/index.json", {"standard": 1})
    with pytest.raises(UserError, match=r"index.json is not a list of rows"):
        ReportInputs.load("mnist", reports, tmp_path)
