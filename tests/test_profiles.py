"""Profiles: each can be written, read back and built; the papers' numbers stand in the papers' profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from casemate.data import build_dataset
from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network
from casemate.params import Network, load_params
from casemate.registry import names, resolve
from casemate.threat import ThreatModel
from casemate.trainable import Task
from pipeline import profile

PROFILES = sorted(p.stem for p in profile.PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_a_written_profile_is_read_back_and_its_network_takes_its_images(name: str, tmp_path: Path) -> None:
    profile.write(name, tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    dataset, network = build_dataset(params.dataset), params.network
    begins: frozenset[str] = getattr(resolve("network", network.name), "initial", frozenset())
    options = {key: value for key, value in network.options.items() if key not in begins}  # no weights are fetched
    assert params.profile == name and params.validation < dataset.counts["train"]  # type: ignore[attr-defined]
    with torch.device("meta"):
        net = build_network(
            network.name, input_shape=dataset.input_shape, num_classes=len(dataset.classes),
            normalise=Normalise(dataset.mean, dataset.std), **options,
        )  # fmt: skip
        assert net.eval()(torch.empty(1, *dataset.input_shape)).shape == (1, len(dataset.classes))
    for row in params.rows.values():
        resolve("defense", row.method)(**row.options)
        if row.recipe.augment:
            assert dataset.pad or dataset.flip, "an augmentation that the data set does not have"


def row(name: str, which: str) -> dict[str, Any]:
    content = profile.resolved(name)
    found: dict[str, Any] = {**content["pretrain"], **content["defenses"], **content["tuned"]}[which]
    return found


def drops(name: str, which: str) -> list[float]:
    """Epochs after which the rate falls, as the validated recipe has them."""
    from casemate.params import check_params

    recipe = check_params(profile.resolved(name)).rows[which].recipe
    return [round(recipe.epochs * m, 6) for m in recipe.milestones]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_the_papers_schedules(name: str) -> None:
    assert drops(name, "atld") == [60, 90] and row(name, "atld")["recipe"]["batch_size"] == 50
    assert drops(name, "at_pgd") == [100, 150] and row(name, "at_pgd")["recipe"]["select"] == "best"
    assert drops(name, "trades") == [74] and row(name, "trades")["recipe"]["epochs"] == 76
    rate = 0.01 if name == "svhn" else 0.1
    assert {row(name, which)["recipe"]["lr"] for which in ("at_pgd", "trades", "atld")} == {rate}
    assert row(name, "atld")["options"].get("pairing_divisor", 2.0) == (10.0 if name == "cifar100" else 2.0)


def test_tiny_imagenet_is_trained_for_a_hundred_thousand_steps() -> None:
    params = profile.resolved("tinyimagenet")
    images = 100_000 - params["validation"]
    recipe = row("tinyimagenet", "at_pgd")["recipe"]
    assert recipe["epochs"] * images / recipe["batch_size"] == pytest.approx(100_000, rel=1e-3)


def test_the_short_cifar10_profile_differs_in_network_and_length_only() -> None:
    long, short = profile.resolved("cifar10"), profile.resolved("cifar10_preact")
    assert short["network"] == {"name": "preact_resnet18", "options": {}, "normalise": True}
    assert {k for k in long if long[k] != short[k]} == {"profile", "network", "pretrain", "defenses"}
    assert all(
        short["defenses"][r]["recipe"]["epochs"] < long["defenses"][r]["recipe"]["epochs"] for r in long["defenses"]
    )


PUBLISHED_STEPS = {"free": 80_000, "tla": 80_000, "lat": 1_000, "l2l_star": 100_000, "l2l_da": 100_000}
PUBLISHED_SIZES = {
    ("adt_exp_am", "generator"): 10_330_880, ("adt_imp_am", "generator"): 10_606_080,
    ("adt_imp_am", "encoder"): 724_384, ("l2l", "generator"): 1_747_851, ("l2l_da", "generator"): 500_944,
    ("er", "critic"): 797_185, ("er", "classifier"): 20_032_592 + 11_008 + 539_146,
    ("trades", "classifier"): 11_172_170,
}  # fmt: skip
"""Parameters; the 11,008 are those of the encoder's batch norms."""


def built(name: str) -> dict[tuple[str, str], int]:
    """(row, module) -> parameters, of everything that the rows of a profile train."""
    from casemate.params import check_params

    params = check_params(profile.resolved(name))
    dataset, sizes = build_dataset(params.dataset), {}
    shape, classes = dataset.input_shape, len(dataset.classes)
    for which, made in params.rows.items():
        network = made.network or params.network

        def build(network: Network = network) -> torch.nn.Module:
            return build_network(network.name, input_shape=shape, num_classes=classes, **network.options)

        task = Task(shape, classes, ThreatModel(params.threat.norm, params.threat.radius), build, made.recipe.player)
        with torch.device("meta"):
            modules = resolve("defense", made.method)(**made.options).modules(task)
        sizes |= {(which, part): sum(p.numel() for p in module.parameters()) for part, module in modules.items()}
    return sizes


def test_every_defense_is_on_cifar10_as_published() -> None:
    """All but two are there; lengths are those of the papers, and every row builds its networks at their sizes."""
    from casemate.params import check_params

    params = check_params(profile.resolved("cifar10_all"))
    assert {row.method for row in params.rows.values()} == set(names("defense")) - {"given", "defense_gan"}
    assert set(params.evaluate.models) == set(params.rows) and params.validation == 1000
    for name, steps in PUBLISHED_STEPS.items():
        recipe = params.rows[name].recipe
        assert recipe.epochs * 49_000 / recipe.batch_size == pytest.approx(steps, rel=1e-3)
    sizes = built("cifar10_all")
    assert {which: sizes[which] for which in PUBLISHED_SIZES} == PUBLISHED_SIZES


ADT_ROWS = ("adt_exp", "adt_exp_am", "adt_imp_am")
SIZES: dict[str, dict[tuple[str, str], int]] = {
    "cifar100": {
        ("adt_exp", "classifier"): 36_536_884, ("adt_exp_am", "generator"): 10_330_880,
        ("adt_imp_am", "generator"): 10_606_080, ("adt_imp_am", "encoder"): 724_384,
        ("feature_scattering", "classifier"): 36_536_884,
    },
    "svhn": {("feature_scattering", "classifier"): 36_479_194},
    "svhn_adt": {
        ("adt_exp", "classifier"): 36_479_194, ("adt_exp_am", "generator"): 10_330_880,
        ("adt_imp_am", "generator"): 10_606_080, ("adt_imp_am", "encoder"): 724_384,
    },
    "stl10": {("er", "classifier"): 82_363_920 + 140_838, ("er", "critic"): 797_185},
    "tinyimagenet": {("l2l_da", "generator"): 573_904},
    "tinyimagenet_er": {},
}  # fmt: skip
"""Published sizes on the other sets; for ER on Tiny ImageNet none is known."""


@pytest.mark.parametrize("name", SIZES)
def test_every_row_of_the_other_sets_is_built_at_its_size_and_evaluated(name: str) -> None:
    sizes = built(name)
    assert {which: sizes[which] for which in SIZES[name]} == SIZES[name]
    assert {which for which, _ in sizes} == set(profile.resolved(name)["evaluate"]["models"])


@pytest.mark.parametrize("name", ["cifar100", "svhn_adt"])
def test_adt_is_trained_as_on_cifar10_and_svhn_is_not_augmented(name: str) -> None:
    for which in ADT_ROWS:
        here, there = row(name, which), row("cifar10_all", which)
        assert here["method"] == there["method"] and here["options"] == there["options"]
        assert here["recipe"] == {**there["recipe"], "augment": name == "cifar100"}
    assert row(name, "standard")["recipe"] == row(name, "adt_exp")["recipe"]


def test_adt_has_a_radius_of_its_own_on_svhn() -> None:
    from casemate.params import check_params

    params = check_params(profile.resolved("svhn_adt"))
    assert params.threat.radius == 4 / 255 and not params.network.normalise
    baseline = params.rows["at_pgd"]
    assert baseline.options == {"steps": 7, "step_size": "1/255"}
    assert baseline.recipe == params.rows["adt_exp"].recipe
    suites = profile.resolved("svhn_adt")["evaluate"]["suites"].values()
    options = [cell.get("options", {}) for suite in suites for cell in suite["attacks"].values()]
    assert {found["step_size"] for found in options if "step_size" in found} == {"1/255"}


@pytest.mark.parametrize("name", ["cifar100", "svhn"])
def test_feature_scattering_is_trained_as_on_cifar10_but_for_the_rate_on_svhn(name: str) -> None:
    here, there = row(name, "feature_scattering"), row("cifar10_all", "feature_scattering")
    changed = {"lr": 0.01, "augment": False} if name == "svhn" else {}
    assert here == {**there, "recipe": {**there["recipe"], **changed}}


@pytest.mark.parametrize(
    ("name", "radius", "step", "code"), [("stl10", 0.03, 0.0078, 16), ("tinyimagenet_er", 0.01, 0.0025, 64)]
)
def test_er_has_its_own_radius_and_encoder(name: str, radius: float, step: float, code: int) -> None:
    er = row(name, "er")
    assert profile.resolved(name)["threat"]["radius"] == radius
    assert er["network"] == {"name": "er_conv", "options": {"dim": 128, "code": code, "closing": "whole"}}
    assert er["options"] == {"steps": 20, "step_size": step, "regulariser": 0.1, "head_lr_scale": 0.05}
    assert {k: er["recipe"][k] for k in ("epochs", "batch_size", "optimizer", "lr")} == {
        "epochs": 30, "batch_size": 64, "optimizer": "adam", "lr": 5e-5,
    }  # fmt: skip


def test_the_self_ensemble_on_stl10() -> None:
    rse = row("stl10", "rse")
    assert (rse["options"]["sigma_input"], rse["options"]["sigma_inner"]) == (0.2, 0.1)
    assert drops("stl10", "rse") == [60, 100] and rse["recipe"]["batch_size"] == 128


def test_l2l_da_on_tiny_imagenet() -> None:
    made, other = row("tinyimagenet", "l2l_da"), row("tinyimagenet", "at_pgd")
    assert (made["options"]["diversity"], made["options"]["generator_lr"], made["start"]) == (0.3, 0.025, "standard")
    assert made["recipe"] == other["recipe"]
    changed = ("diversity", "generator_lr")
    assert made["options"] == {**row("cifar10_all", "l2l_da")["options"], **{k: made["options"][k] for k in changed}}


@pytest.mark.parametrize(
    ("which", "epochs"),
    [
        ("at_pgd", [100, 150]), ("at_awp", [100, 150]), ("trades_awp", [100, 150]), ("trades", [74]),
        ("adt_exp", [74]),
        ("feature_scattering", [60, 90]), ("bilateral", [100, 150]), ("l2l", [29, 59]), ("atld", [60, 90]),
        ("rse", [80, 140, 180]), ("mart", [74, 89, 99]),
    ],
)  # fmt: skip
def test_the_rate_of_every_published_schedule_falls_when_it_should(which: str, epochs: list[float]) -> None:
    assert drops("cifar10_all", which) == epochs


def test_weight_perturbation_averaging_and_stopping_are_rows_of_their_own() -> None:
    at_pgd = row("cifar10_all", "at_pgd")
    changed = {"at_awp": {"awp": 0.01}, "at_ema": {"ema": 0.999}, "at_early": {"select": "best", "validate_every": 1}}
    for name, change in changed.items():
        assert row("cifar10_all", name) == {**at_pgd, "recipe": {**at_pgd["recipe"], **change}}
    assert row("cifar10_all", "trades_awp")["recipe"]["awp"] == 0.005


STUDIED: dict[str, dict[str, Any]] = {
    "l2l_da": {"width": 64, "steps": 10, "step_factor": 0.25, "gradient_norm": "channel"},
    "l2l": {"network": "wide", "width": 64},
    "adt_exp": {"steps": 7, "samples": 5},
    **{
        f"adt_{form}_am": {"width": 256, "gradient_input": "batch64", "generator_lr": 2e-4} for form in ("exp", "imp")
    },
    **{name: {"head_lr_scale": 0.05} for name in ("er", "er_minus", "er_trades", "e_cla", "vae_cla")},
    "tla": {"dictionary": 1, "steps": 40},
    "lat": {"latent_steps": 20, "latent_step": 0.125},
    "free": {"replays": 8},
    "defense_gan": {"width": 64, "latent": 128, "steps": 200, "restarts": 10},
}
"""Published options that mnist_all makes smaller."""


@pytest.mark.parametrize("which", STUDIED)
def test_the_study_has_the_published_options(which: str) -> None:
    options = row("mnist_study", which)["options"]
    assert {key: options[key] for key in STUDIED[which]} == STUDIED[which]


def test_the_study_adds_the_other_loss_and_evaluates_every_row() -> None:
    from casemate.params import check_params

    params = check_params(profile.resolved("mnist_study"))
    assert set(params.evaluate.models) == set(params.rows)
    assert params.rows["at_awp"].recipe.awp == 0.01
    for form in ("exp", "imp"):
        one, other = (params.rows[f"adt_{form}_am{loss}"] for loss in ("", "_trades"))
        assert other.options == {**one.options, "loss": "trades", "beta": 1.0} and other.method == one.method
        assert other.recipe == one.recipe


def test_the_ten_classes_are_trained_as_published() -> None:
    content = profile.resolved("imagenet10")
    rows = {**content["pretrain"], **content["defenses"]}
    for name, other in ((n, rows[f"{n}_inception"]) for n in rows if f"{n}_inception" in rows):
        assert rows[name]["recipe"] == other["recipe"] and rows[name].get("options") == other.get("options")
        recipe = rows[name]["recipe"]
        assert (recipe["lr"], recipe["batch_size"], recipe["epochs"]) == (0.1, 128, 200)
    assert {row["method"] for row in rows.values()} == {"standard", "free", "at_pgd", "iwdd", "iwdd_plus_pgd"}


def test_another_seed_has_a_folder_of_its_own_and_is_no_edit_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    profile.write("quick", path, seed=3)
    params = load_params(path)
    assert (params.profile, params.seed) == ("quick_s3", 3)
    profile.write("quick", path)  # replaces what a command wrote
    own = profile.resolved("quick")["seed"]
    profile.write("quick", path, seed=own)
    assert load_params(path).profile == "quick"
    path.write_text(path.read_text().replace("budget: 1.0", "budget: 0.5"))
    with pytest.raises(UserError, match="edited by hand"):
        profile.write("quick", path, seed=3)
