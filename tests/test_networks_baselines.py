"""Networks of Defense-GAN, of the attack on it, of TLA, LID and ER's baselines: counts, contract, what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_networks import CIFAR, MNIST
from test_networks import test_features_taps_and_splits_are_the_forward_pass as contract
from test_networks import test_the_input_gradient_can_be_traced_for_any_batch as traced
from torch import nn

from casemate.errors import UserError
from casemate.networks.base import Classifier, build_network, count_parameters
from casemate.registry import resolve

LETTERS = {"A": 1_285_194, "B": 710_218, "C": 1_387_210, "D": 199_210, "E": 199_210, "F": 710_218}
COUNTS: list[tuple[str, Any, dict[str, Any], int]] = [  # the last three by hand
    *(("defense_gan_net", MNIST, {"letter": letter}, count) for letter, count in LETTERS.items()),
    ("manifold_cnn", MNIST, {}, 1_861_898),
    ("madry_wrn", CIFAR, {"units": 4}, 36_220_634),
    ("tla_cnn", MNIST, {}, 13_244_170 + 3_008),
    ("er_plain_cnn", MNIST, {}, 520 + 25_050 + 801 * 500 + 5_010),
    ("lid_cnn", MNIST, {}, 640 + 36_928 + 9_217 * 128 + 1_290 + 2 * (64 + 64 + 128)),
    (
        "lid_cnn", CIFAR, {},
        896 + 9_248 + 18_496 + 36_928 + 73_856 + 147_584 + 2_049 * 1_024 + 1_025 * 512 + 5_130
        + 2 * (2 * 32 + 2 * 64 + 2 * 128 + 1_024 + 512),
    ),
]  # fmt: skip


def built(name: str, shape: Any = MNIST, **options: Any) -> Classifier:
    torch.manual_seed(0)
    return build_network(name, input_shape=shape, num_classes=10, **options)


def dropouts(made: Classifier) -> dict[str, float]:
    """The rates, by the path of their layer."""
    return {name: part.p for name, part in made.named_modules() if isinstance(part, nn.Dropout)}


@pytest.mark.parametrize(("name", "shape", "options", "count"), COUNTS)
def test_parameter_counts(name: str, shape: Any, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        made = build_network(name, input_shape=shape, num_classes=10, **options)
    assert count_parameters(made) == count
    assert f"{count:,}" in (resolve("network", name).__doc__ or "")


def test_tlas_count_is_of_weights_and_biases_and_of_batch_norms() -> None:
    with torch.device("meta"):
        made = build_network("tla_cnn", input_shape=MNIST, num_classes=10)
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 5 and sum(count_parameters(m) for m in norms) == 3_008


SMALL = [
    ("defense_gan_net", MNIST, {"letter": "A"}, 128),
    ("defense_gan_net", MNIST, {"letter": "B"}, 128),
    ("defense_gan_net", MNIST, {"letter": "D"}, 200),
    ("manifold_cnn", MNIST, {}, 128),
    ("tla_cnn", MNIST, {}, 1024),
    ("er_plain_cnn", MNIST, {}, 500),
    ("lid_cnn", MNIST, {}, 128),
    ("lid_cnn", CIFAR, {}, 512),
]


@pytest.mark.parametrize(("name", "shape", "options", "width"), SMALL)
def test_they_keep_the_classifier_contract(name: str, shape: Any, options: dict[str, Any], width: int) -> None:
    contract(name, shape, options, width)


@pytest.mark.parametrize(("name", "options"), [("defense_gan_net", {"letter": "B"}), ("lid_cnn", {})])
def test_their_input_gradient_can_be_traced(name: str, options: dict[str, Any]) -> None:
    traced(name, MNIST, options)


@pytest.mark.parametrize("name", ["defense_gan_net", "manifold_cnn", "tla_cnn", "er_plain_cnn"])
def test_a_wrong_shape_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} takes 1x28x28 images, not 3x32x32"):
        built(name, CIFAR)


def test_lids_networks_know_two_shapes() -> None:
    with pytest.raises(UserError, match="lid_cnn takes 1x28x28 or 3x32x32 images, not 3x28x28"):
        built("lid_cnn", (3, 28, 28))


# --- Defense-GAN's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letter", "sizes"),
    [("A", [28, 12]), ("B", [14, 5]), ("C", [28, 12])],  # before the last map is flattened
)
def test_maps_are_those_of_the_authors_padding(letter: str, sizes: list[int]) -> None:
    made, seen, x = built("defense_gan_net", letter=letter), [], torch.rand(1, *MNIST)
    for part in made.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda module, given, out: seen.append(out.shape[2]))
    made(x)
    assert seen[: len(sizes)] == sizes


def test_where_the_dropout_is_and_what_its_rates_mean() -> None:
    expected = {
        "A": {"body.conv2.2": 0.25, "body.fc1.3": 0.5}, "B": {"body.conv1.0": 0.2, "body.conv3.3": 0.5},
        "C": {"body.conv2.2": 0.25, "body.fc1.3": 0.5}, "D": {"body.fc1.3": 0.5}, "E": {}, "F": {},
    }  # fmt: skip
    for letter, rates in expected.items():
        assert dropouts(built("defense_gan_net", letter=letter)) == rates
        kept = dropouts(built("defense_gan_net", letter=letter, dropout="kept"))
        assert kept == pytest.approx({name: 1 - rate for name, rate in rates.items()})


def test_two_letters_are_others_without_dropout() -> None:
    x = torch.rand(2, *MNIST)
    for one, other in (("B", "F"), ("D", "E")):
        full, without = built("defense_gan_net", letter=one), built("defense_gan_net", letter=other)
        assert torch.equal(full.eval()(x), without.train()(x))


def test_every_unit_begins_with_weights_of_unit_norm() -> None:
    made = built("defense_gan_net", letter="A")
    parts = [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(parts) == 4
    for part in parts:
        assert part.bias is not None and not part.bias.any()
        norms = part.weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(len(norms)))


def test_the_manifold_attacks_network_by_hand() -> None:
    made, x = built("manifold_cnn").eval(), torch.rand(2, *MNIST)
    one, two, three, hidden = [m for m in made.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    h = F.max_pool2d(F.relu(two(F.relu(one(x)))), 2)
    h = F.relu(hidden(F.relu(three(h)).flatten(1)))
    assert torch.equal(made(x), made.head(h))
    assert dropouts(made) == {"body.conv3.3": 0.25, "body.fc1.2": 0.5}


# --- TLA, LID, ER -----------------------------------------------------------------------------------------------


def test_tla_normalises_before_the_relu_and_lid_behind_it() -> None:
    for name, kinds in (("tla_cnn", (nn.BatchNorm2d, nn.ReLU)), ("lid_cnn", (nn.ReLU, nn.BatchNorm2d))):
        first = built(name).body["conv1"]
        assert isinstance(first, nn.Sequential)
        assert all(isinstance(part, kind) for part, kind in zip(first[1:3], kinds, strict=True))
    pooled = {"tla_cnn": ["conv2", "conv4"], "lid_cnn": ["conv2", "conv4", "conv6"]}
    for name, layers in pooled.items():
        made = built(name, CIFAR if name == "lid_cnn" else MNIST)
        assert [k for k, v in made.body.items() if any(isinstance(m, nn.MaxPool2d) for m in v.modules())] == layers
    assert dropouts(built("lid_cnn")) == {"body.conv2.4": 0.5, "body.fc1.3": 0.5}
    assert set(dropouts(built("lid_cnn", CIFAR)).values()) == {0.5} and len(dropouts(built("lid_cnn", CIFAR))) == 3


def test_ers_baseline_may_pool_before_the_relu() -> None:
    made, x = built("er_plain_cnn"), torch.rand(2, *MNIST)
    one, two, hidden = [m for m in made.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    h = F.max_pool2d(F.relu(two(F.max_pool2d(F.relu(one(x)), 2))), 2)
    assert torch.equal(made(x), made.head(F.relu(hidden(h.flatten(1)))))
