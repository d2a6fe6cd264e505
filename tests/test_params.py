"""params.yaml: every profile is valid, every kind of mistake gets one line that names its path and the mend."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from casemate import registry
from casemate.errors import UserError
from casemate.fields import Count, fraction
from casemate.params import check_params, load_params
from pipeline import profile

PROFILES = sorted(p.stem for p in profile.PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_valid_and_named_by_their_file(name: str) -> None:
    assert check_params(profile.resolved(name)).profile == name


def test_the_committed_params_are_the_default_profile() -> None:
    assert Path("params.yaml").read_text() == profile.text("mnist")


def put(path: str, value: Any) -> dict[str, Any]:
    """The default profile with one value changed."""
    content = copy.deepcopy(profile.resolved("mnist"))
    at: Any = content
    *head, last = path.split(".")
    for key in head:
        at = at[key]
    at[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sed", 1, ["sed: unknown key", "did you mean 'seed'"]),
        ("defenses.trades.options.bta", 1.0, ["defenses.trades.options.bta: unknown key", "'beta'"]),
        ("defenses.trades.recipe.epoch", 3, ["defenses.trades.recipe", "epoch", "'epochs'"]),
        ("defenses.trades.method", "trads", ["defenses.trades", "unknown defense 'trads'", "'trades'"]),
        ("evaluate.suites.extended.attacks.fgsm.attack", "fgms", ["fgsm", "unknown attack 'fgms'", "'fgsm'"]),
        ("evaluate.suites.extended.attacks.pgd40.options.step", 1, ["pgd40", "step: unknown key", "'steps'"]),
        ("dataset", "mnits", ["dataset", "unknown dataset 'mnits'", "'mnist'"]),
        ("network.name", "lenet", ["network", "unknown network 'lenet'", "'lenet5'"]),
        ("threat.radius", -0.1, ["threat.radius", "greater than 0", "-0.1"]),
        ("threat.radius", 0, ["threat.radius", "greater than 0"]),
        ("threat.radius", "8/0", ["threat.radius", "8/0"]),
        ("threat.norm", "l3", ["threat.norm", "l3"]),
        ("seed", True, ["seed", "True"]),
        ("budget", 0, ["budget", "greater than 0"]),
        ("defenses.at_pgd.options.steps", 0, ["defenses.at_pgd.options.steps", "greater than or equal to 1"]),
        (
            "evaluate.floors",
            [{"rows": ["at_pdg"], "suite": "core", "accuracy": 1}],
            ["floors: no row 'at_pdg'", "'at_pgd'"],
        ),
        ("notes", {"at_pdg": "slim"}, ["notes: no row 'at_pdg'", "'at_pgd'"]),
        ("evaluate.models", ["standard", "at_pdg"], ["evaluate.models", "no row 'at_pdg'", "'at_pgd'"]),
        ("device", "gpu", ["device", "gpu"]),
        ("threat", {"norm": "linf"}, ["threat.radius: this key is needed"]),
    ],
)
def test_mistakes_name_their_path_and_the_mend(path: str, value: Any, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_params(put(path, value))
    message = str(caught.value)
    assert "\n" not in message
    for words in expected:
        assert words in message


CELL = "evaluate.suites.extended.attacks.mine"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"attack": "pgd", "threat": {"norm": "linf", "radius": 0}}, "mine.threat.radius: .* greater than 0"),
        ({"attack": "rays", "threat": {"norm": "l2", "radius": 2}}, f"{CELL}: attack rays works in linf, not in l2"),
        ({"attack": "exp_am", "threat": {"norm": "l2", "radius": 2}}, f"{CELL}: attack exp_am works in linf, not"),
        ({"attack": "cw_l2", "search": "bf16"}, f"{CELL}: search: bf16 cannot .* as cw_l2 has a budget of its own"),
        ({"attack": "stadv", "search": "bf16"}, f"{CELL}: search: bf16 cannot .* as stadv has a budget of its own"),
        (
            {"attack": "spsa", "options": {"samples": 3}},
            f"{CELL}: SPSA looks at pairs: samples must be even, and is 3",
        ),
        (
            {"attack": "pgd", "options": {"step_size": 0.01, "relative_step": 0.1}},
            f"{CELL}: PGD: give step_size or relative_step, not both",
        ),
        (
            {"attack": "gap", "target": 0},
            f"{CELL}: target: gap is one pass of a fitted generator, and cannot be aimed",
        ),
        ({"attack": "advgan", "target": 0}, "target: advgan is one pass"),
    ],
)
def test_what_an_attack_would_refuse_is_refused_before_anything_is_trained(cell: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_params(put(CELL, cell))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cell",
    [
        {"attack": "pgd", "search": "bf16", "target": 0}, {"attack": "rays"}, {"attack": "exp_am"},
        {"attack": "autoattack", "search": "bf16", "threat": {"norm": "l2", "radius": 2}},
        {"attack": "l2l_da", "target": 0}, {"attack": "cw_l2", "threat": {"norm": "l2", "radius": 2}},
    ],
)  # fmt: skip
def test_what_an_attack_can_do_is_not_refused(cell: dict[str, Any]) -> None:
    check_params(put(f"evaluate.suites.extended.attacks.{cell['attack']}", cell))


def test_everything_that_is_measured_has_its_norm() -> None:
    content = put("threat", {"norm": "l2", "radius": 2})
    with pytest.raises(UserError, match=r"evaluate.suites.strong.attacks.rays: attack rays works in linf, not in l2"):
        check_params(content)
    content = put("evaluate.sweep.attack", "cw_adam")
    content["evaluate"]["sweep"]["options"] = {}
    content["threat"] = {"norm": "l2", "radius": 2}
    content["evaluate"]["suites"] = {"core": {"attacks": {"fgsm": {"attack": "fgsm"}}}}
    content["evaluate"]["procedures"] = None
    with pytest.raises(UserError, match=r"evaluate.sweep: attack cw_adam works in linf, not in l2"):
        check_params(content)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in registry.TABLES for n in registry.names(k)])
def test_what_a_class_says_of_its_fields_can_be_asked_without_importing_it(kind: str, name: str) -> None:
    """Its `__post_init__` uses nothing but its fields; one that needs an import would raise NameError here."""
    with contextlib.suppress(ValidationError):  # a field that has no default
        registry.check(kind, name, {})


def test_the_rules_are_those_of_the_class() -> None:
    for options in ({"window": 4}, {"growth": 0.5}):
        with pytest.raises(UserError) as own:
            registry.resolve("attack", "pixel_mass_wasserstein")(**options)
        with pytest.raises(ValueError) as read:
            registry.check("attack", "pixel_mass_wasserstein", options)
        assert str(read.value) == str(own.value)
    with pytest.raises(ValueError, match="the fractions must ascend"):  # a rule of a base class
        registry.check("defense", "at_pgd", {"plan": [[0.8, 7], [0.3, 5]]})


def test_a_row_under_pretrain_and_defenses_is_refused() -> None:
    content = put("defenses.standard", profile.resolved("mnist")["pretrain"]["standard"])
    with pytest.raises(UserError, match=r"defenses.standard: this row is under pretrain too"):
        check_params(content)


TUNED = {"method": "at_pgd", "start": "standard", "recipe": {"epochs": 1, "lr": 0.1}}


def test_a_tuned_row_is_a_row() -> None:
    params = check_params(put("tuned", {"warm": TUNED}))
    assert params.rows["warm"].method == "at_pgd" and params.tuned["warm"].start == "standard"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("tuned", {"at_pgd": TUNED}, "tuned.at_pgd: this row is under defenses too"),
        (
            "tuned",
            {"warm": {**TUNED, "start": "standrd"}},
            "tuned.warm.start: no row 'standrd' .*did you mean 'standard'",
        ),
        ("tuned", {"a": TUNED, "b": {**TUNED, "start": "a"}}, "tuned.b.start: no row 'a' under pretrain or defenses"),
        ("tuned", {"warm": {k: v for k, v in TUNED.items() if k != "start"}}, "tuned.warm.start: this key is needed"),
        (
            "finetune.victims",
            ["trade"],
            "finetune.victims: no row 'trade' under evaluate.models; did you mean 'trades'",
        ),
    ],
)
def test_tuned_rows_and_victims_must_exist(path: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_params(put(path, value))


def test_a_row_may_have_a_network_of_its_own() -> None:
    params = check_params(put("defenses.at_pgd.network", {"name": "small_cnn", "options": {}}))
    assert params.rows["at_pgd"].network is not None and params.rows["trades"].network is None
    with pytest.raises(UserError, match=r"defenses.at_pgd.network: unknown network 'small'"):
        check_params(put("defenses.at_pgd.network", {"name": "small"}))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_the_keys_that_the_stages_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(profile.text(name))
    assert load_params(tmp_path / "params.yaml").profile == name


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("detect", "detect: this key is needed, as the stages read it; 'detect: {}' for none"),
        ("notes", "notes: this key is needed, as the stages read it; 'notes: {}' for none"),
        ("train_size", "train_size: this key is needed, as the stages read it; 'train_size: null' for none"),
        ("export", "export: this key is needed, as the stages read it$"),
        ("export.models", "export.models: this key is needed"),
        ("evaluate.source", "transfer needs evaluate.source"),
    ],
)
def test_a_file_that_lacks_what_the_stages_read_is_refused(path: str, said: str, tmp_path: Path) -> None:
    content = copy.deepcopy(profile.resolved("mnist"))
    *head, last = path.split(".")
    del (content[head[0]] if head else content)[last]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=said):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("export.models", [], "export.models: the stages need at least one row"),
        ("export.models", ["at_pgd", "at_pgd"], "export.models: at_pgd is there twice"),
        ("evaluate.models", ["standard", "trades"], "export.models: at_pgd is not evaluated"),
        ("threat.radius", 8, "radius 8 in linf: pixels are in [0, 1]; did you mean 8/255?"),
    ],
)
def test_what_only_the_last_stages_would_refuse_is_refused_first(
    path: str, value: Any, said: str, tmp_path: Path
) -> None:
    content = put(path, value)
    if path == "evaluate.models":
        content["finetune"]["victims"], content["study"] = "all", {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=re.escape(said)):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", [b"seed: 0\nseed: 1\n", b"# caf\xe9\nseed: 0\n", b"a: 1\n<<<<<<< a\nb: 2\n"])
def test_a_file_that_says_two_things_or_nothing_is_one_line_and_is_not_lost(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'seed' is there twice|no text file in UTF-8|not valid YAML"):
        load_params(path)
    with pytest.raises(UserError, match="edited by hand"):
        profile.write("smoke", path)
    assert path.read_bytes() == content
    profile.write("smoke", path, force=True)
    assert load_params(path).profile == "smoke"


@pytest.mark.parametrize("content", ["- 1", "seed: abc", "seed: -1"])
def test_a_broken_file_is_one_edited_by_hand(content: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(UserError, match="edited by hand"):
        profile.write("smoke", tmp_path / "params.yaml")


def test_a_pipeline_needs_a_source(tmp_path: Path) -> None:
    content = put("evaluate.source", None)
    for suite in content["evaluate"]["suites"].values():
        suite["attacks"] = {key: cell for key, cell in suite["attacks"].items() if cell["attack"] != "transfer"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"evaluate.source: the stages need a row"):
        load_params(tmp_path / "params.yaml")


def test_a_default_may_be_a_quotient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "@spec\nclass A(B):\n    radius: Positive = 8 / 255\n    steps: Count = {}\n"
    tree = ast.parse(text.format("3"))
    monkeypatch.setattr(registry, "_tree", lambda module: tree)
    assert registry._fields("m", "A") == {"radius": (registry.VOCABULARY["Positive"], 8 / 255), "steps": (Count, 3)}
    tree = ast.parse(text.format("min(3, 4)"))
    with pytest.raises(LookupError, match=r"m:A.steps: the default min\(3, 4\) must be a literal"):
        registry._fields("m", "A")


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.3", 0.3), (0.3, 0.3), ("1e-3", 1e-3)])
def test_fractions(text: Any, value: float) -> None:
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["8/255/2", "nan", "inf", "__import__('os')", True, "1/0"])
def test_what_is_no_fraction(text: Any) -> None:
    with pytest.raises(ValueError):
        fraction(text)


def test_a_profile_edited_by_hand_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    profile.write("quick", target)
    profile.write("smoke", target)  # unedited: replaced without a word
    edited = target.read_text().replace("seed: 0", "seed: 7")
    target.write_text(edited)
    with pytest.raises(UserError, match="edited by hand"):
        profile.write("quick", target)
    assert target.read_text() == edited
    profile.write("quick", target, force=True)
    assert yaml.safe_load(target.read_text())["profile"] == "quick"


def test_an_unknown_profile_names_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mnist'"):
        profile.write("mnst", tmp_path / "params.yaml")


def test_replace_in_a_profile_drops_the_rest() -> None:
    assert profile.merged({"a": {"x": 1}, "b": 1}, {"a": {"replace": True, "y": 2}}) == {"a": {"y": 2}, "b": 1}
