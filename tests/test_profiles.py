"""Profiles: each can be written, read back and built; the papers' numbers stand in the papers' profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from casemate.data import build_dataset
from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network
from casemate.params import load_params
from casemate.registry import resolve
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
    found: dict[str, Any] = {**content["pretrain"], **content["defenses"]}[which]
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
