"""Artifacts: what is saved is what is loaded, strictly, and a file that is not ours is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.atld import ATLD
from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.artifact import (
    _Network,
    _Read,
    _task,
    load_artifact,
    load_modules,
    load_system,
    make_card,
    save_artifact,
)
from casemate.training.loop import Trained, train
from casemate.training.recipe import Recipe

SHAPE = (1, 8, 8)
NORMALISE = ((0.3,), (0.4,))
THREAT = ThreatModel("linf", 0.1)
OPTIONS = {"critic_depth": 10, "critic_width": 1}
METHOD = ATLD(**OPTIONS)


@pytest.fixture(scope="module")
def trained() -> tuple[Trained, Recipe]:
    """ATLD on noise, two steps: a classifier and a critic, both with everything."""
    draw = np.random.default_rng(0)
    images = Images(draw.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 10)
    recipe = Recipe(epochs=1, lr=0.1, batch_size=10)

    def network() -> torch.nn.Module:
        return build_network("digits_cnn", input_shape=SHAPE, num_classes=10, normalise=Normalise(*NORMALISE))

    task = Task(SHAPE, 10, THREAT, network, recipe.player)
    return train(METHOD, task, DeviceData(images), DeviceData(images), recipe, seed=0, device="cpu"), recipe


@pytest.fixture
def folder(tmp_path: Path, trained: tuple[Trained, Recipe]) -> Path:
    card = card_of(*trained)
    save_artifact(tmp_path / "atld", trained[0].modules, card)
    return tmp_path / "atld"


def card_of(result: Trained, recipe: Recipe) -> dict[str, Any]:
    return make_card(
        dataset="digits", data_checksum="abc", classes=[str(i) for i in range(10)], input_shape=SHAPE,
        network="digits_cnn", network_options={}, normalise=NORMALISE, defense="atld", defense_options=OPTIONS,
        recipe=recipe, threat=THREAT, seed=0, budget=0.5, trained=result,
    )  # fmt: skip


def test_the_same_bits_come_back(folder: Path, trained: tuple[Trained, Recipe]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    defense, modules, card = load_modules(folder)
    assert torch.equal(torch.rand(2), expected), "loading draws from no global generator"
    assert defense == METHOD and list(modules) == ["classifier", "critic"]
    for name, module in modules.items():
        original = trained[0].modules[name].state_dict()
        assert not module.training
        assert all(torch.equal(original[key], tensor) for key, tensor in module.state_dict().items())
    assert card["effective_epochs"] == 1 and card["budget"] == 0.5 and card["metrics"]["chosen"]["epoch"] == 1
    assert card["code"].keys() >= {"casemate.defenses.atld", "casemate.networks.small", "casemate.training.loop"}
    assert card["defense"]["options"] == json.loads(json.dumps(asdict(METHOD))), "defaults are written out"
    assert card["parameters"]["classifier"] == 29_914


def test_every_mode_loads_as_a_system_and_they_decide_alike(folder: Path, trained: tuple[Trained, Recipe]) -> None:
    x = torch.rand(6, *SHAPE)
    primary, off = load_system(folder), load_system(folder, "off")
    assert (primary.name, off.name, load_system(folder, "imt").name) == ("atld", "atld+off", "atld")
    assert primary.changes_inference and not off.changes_inference
    with torch.no_grad():
        torch.testing.assert_close(off.logits(x), trained[0].modules["classifier"](x))
    with pytest.raises(UserError, match="no inference mode 'imd'; did you mean 'imt'"):
        load_system(folder, "imd")


def test_equal_runs_write_equal_files(folder: Path, tmp_path: Path, trained: tuple[Trained, Recipe]) -> None:
    save_artifact(tmp_path / "again", trained[0].modules, card_of(*trained))
    for name in ("weights.safetensors", "card.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "weights.safetensors"]


def change_card(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps({**card, **changes}))

    return change


def change_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """Change the tensors and sign the file anew, so that only the tensors are wrong."""

    def rewrite(folder: Path) -> None:
        tensors, _ = load_artifact(folder)
        flat = {f"{m}/{key}": t for m, own in tensors.items() for key, t in own.items()}
        save_file(change(flat), folder / "weights.safetensors")
        digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        change_card(weights_sha256=digest)(folder)

    return rewrite


HEAD = "classifier/head.bias"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "card.json").unlink(), "card.json does not exist"),
        (lambda f: (f / "card.json").write_text("<html>"), "card.json is not JSON"),
        (lambda f: (f / "card.json").write_text("[1]"), "card.json has schema None"),
        (change_card(schema=99), "schema 99, this version reads 1"),
        (change_card(network=None), "card.json: network"),
        (change_card(threat={"norm": "linf", "radius": float("nan")}), r"threat\.radius"),
        (change_card(defense={"method": "tradse", "options": {}}), "unknown defense 'tradse'; did you mean 'trades'"),
        (change_card(defense={"method": "atld", "options": {"betta": 1}}), "does not fit this version"),
        (change_card(defense={"method": "standard", "options": {}}), "has modules classifier, critic where standard"),
        (change_card(input_shape=[3, 32, 32]), "does not fit this version"),
        (change_card(modules=["classifier"]), "tensors of 'critic'"),
        (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors does not exist"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"PK\x03\x04"), "is not the file that card.json"),
        (change_weights(lambda t: {k: v for k, v in t.items() if k != HEAD}), "has no tensor 'head.bias'"),
        (change_weights(lambda t: {**t, HEAD: torch.zeros(7)}), r"head.bias has shape \(7,\) instead of \(10,\)"),
        (change_weights(lambda t: {**t, "classifier/x": torch.zeros(1)}), "unknown tensor 'x'"),
    ],
)
def test_what_is_not_ours_is_named_in_one_line(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_system(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_trained_artifact_is_read_without_the_weights_it_began_with(tmp_path: Path) -> None:
    network = _Network(
        name="resnet101",
        options={"weights": str(tmp_path / "gone.pth"), "sha256": "0" * 64, "rows": [1, 2]},
        normalise={"mean": [0.5] * 3, "std": [0.5] * 3},  # type: ignore[arg-type]
    )
    read = _Read(
        modules=[], weights_sha256="", dataset="imagenet10", classes=["a", "b"], input_shape=(3, 32, 32),
        network=network, defense={"method": "standard", "options": {}}, recipe={"epochs": 1, "lr": 0.1},  # type: ignore[arg-type]
        threat={"norm": "linf", "radius": 0.1}, seed=0,  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.device("meta"):
        assert _task(read).network().head.weight.shape == (2, 2048)  # type: ignore[union-attr]
