"""Networks: parameter counts, the features-head-taps-split contract, accepted shapes, traceability, critics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from casemate.errors import UserError
from casemate.networks.base import Normalise, build_network, count_parameters
from casemate.networks.critics import FeatureCritic, WideCritic, build_critic, centre_taps, read_codes

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)

COUNTS = [  # DEFENSES 1.6; digits_cnn by hand: 160 + 4,640 + 24,624 + 490; compact_resnet: 2,816 of them BatchNorm's
    ("compact_resnet", CIFAR, 10, {}, 3_072 + 77_824 + 229_376 + 917_504 + 2_570 + 2_816),
    ("digits_cnn", (1, 8, 8), 10, {}, 29_914),
    ("lenet5", MNIST, 10, {}, 61_706),
    ("small_cnn", MNIST, 10, {}, 312_202),
    ("resnet20", CIFAR, 10, {}, 269_722),
    ("preact_resnet18", CIFAR, 10, {}, 11_172_170),
    ("preact_resnet18", CIFAR, 100, {}, 11_218_340),
    ("wrn", CIFAR, 10, {}, 36_479_194),
    ("wrn", CIFAR, 100, {}, 36_536_884),
    ("wrn", CIFAR, 10, {"depth": 34}, 46_160_474),
]


@pytest.mark.parametrize(("name", "shape", "classes", "options", "count"), COUNTS)
def test_parameter_counts(name: str, shape: Any, classes: int, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_network(name, input_shape=shape, num_classes=classes, **options)) == count


@pytest.mark.parametrize(("channels", "count"), [(10, 9_133_963), (100, 9_175_813)])
def test_the_critic_has_the_published_count(channels: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(WideCritic(channels, channels, form="conv3x3")) == count


SMALL = [
    ("digits_cnn", (1, 8, 8), {}, 48),
    ("lenet5", MNIST, {}, 84),
    ("small_cnn", MNIST, {}, 200),
    ("compact_resnet", (3, 16, 16), {}, 256),
    ("resnet20", (3, 16, 16), {}, 64),
    ("preact_resnet18", (3, 16, 16), {}, 512),
    ("wrn", (3, 16, 16), {"depth": 10, "width": 2}, 128),
]


@pytest.mark.parametrize(("name", "shape", "options", "width"), SMALL)
def test_features_taps_and_splits_are_the_forward_pass(
    name: str, shape: Any, options: dict[str, Any], width: int
) -> None:
    torch.manual_seed(0)
    f = build_network(name, input_shape=shape, num_classes=7, normalise=_normalise(shape), **options).eval()
    nn.init.normal_(f.head.weight)  # small_cnn's head begins at zero, which would make every comparison true
    x = torch.rand(3, *shape)
    with torch.no_grad():
        logits = f(x)
        features = f.features(x)
        assert logits.shape == (3, 7) and features.shape == (3, width)
        assert logits.std() > 0
        assert torch.equal(f.head(features), logits)
        seen = f.taps(x, [*f.layers, "head"])
        assert list(seen) == [*f.layers, "head"]
        assert torch.equal(seen["head"], logits) and torch.equal(seen[f.layers[-1]], features)
        for layer in f.layers:
            lower, upper = f.split(layer)
            assert torch.equal(lower(x), seen[layer])
            assert torch.equal(upper(lower(x)), logits)


def _normalise(shape: Any) -> Normalise:
    return Normalise([0.3] * shape[0], [0.5] * shape[0])


def test_normalisation_is_inside_the_network() -> None:
    torch.manual_seed(0)
    f = build_network("digits_cnn", input_shape=(1, 8, 8), num_classes=10, normalise=Normalise([0.25], [0.5])).eval()
    x = torch.rand(2, 1, 8, 8)
    inner = f(x)
    f.normalise = nn.Identity()
    torch.testing.assert_close(f((x - 0.25) / 0.5), inner)


def test_lenet_may_pool_before_the_relu() -> None:
    torch.manual_seed(0)
    f, x = build_network("lenet5", input_shape=MNIST, num_classes=10), torch.rand(4, *MNIST)
    conv1, conv2 = f.body["conv1"][0], f.body["conv2"][0]  # type: ignore[index]
    h = F.max_pool2d(F.relu(conv1(x)), 2)
    h = F.max_pool2d(F.relu(conv2(h)), 2)
    assert torch.equal(f.split("conv2")[0](x), h)


def test_resnet20_shortcuts_have_no_parameters_and_pad_both_sides() -> None:
    f = build_network("resnet20", input_shape=CIFAR, num_classes=10)
    block = f.body["stage2"][0]  # type: ignore[index]
    with torch.no_grad():
        block.norm2.weight.zero_()
    x = torch.rand(2, 16, 8, 8)
    out = block.eval()(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_preactivation_projects_the_activated_input_and_keeps_the_raw_one() -> None:
    f = build_network("wrn", input_shape=CIFAR, num_classes=10, depth=16, width=1)
    changed, kept = f.body["stage2"][0].eval(), f.body["stage2"][1].eval()  # type: ignore[index]
    with torch.no_grad():
        changed.conv2.weight.zero_()
        kept.conv2.weight.zero_()
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(changed(x), changed.shortcut(F.relu(changed.norm1(x))))
    raw = torch.randn(2, 32, 4, 4)
    assert kept.shortcut is None and torch.equal(kept(raw), raw)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("lenet5", (3, 32, 32), "lenet5 takes 1x28x28 images, not 3x32x32"),
        ("digits_cnn", (1, 28, 28), "digits_cnn takes 1x8x8 images, not 1x28x28"),
        ("resnet20", (3, 30, 32), "multiples of 4, not 3x30x32"),
        ("preact_resnet18", (3, 28, 28), "multiples of 8, not 3x28x28"),
    ],
)
def test_a_wrong_shape_is_refused(name: str, shape: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_network(name, input_shape=shape, num_classes=10)


def test_a_wrong_depth_is_refused() -> None:
    with pytest.raises(UserError, match=r"6 n \+ 4.*not 30"):
        build_network("wrn", input_shape=CIFAR, num_classes=10, depth=30)


TRACED = [  # the other networks are made of the same layers
    ("lenet5", MNIST, {}),
    ("compact_resnet", (1, 8, 8), {}),
    ("resnet20", (1, 8, 8), {}),
    ("wrn", (1, 8, 8), {"depth": 10, "width": 1}),
]


@pytest.mark.parametrize(("name", "shape", "options"), TRACED)
def test_the_input_gradient_can_be_traced_for_any_batch(name: str, shape: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    f = build_network(name, input_shape=shape, num_classes=4, **options).eval()
    critic = WideCritic(4, 4, form="conv1x1", depth=10, width=1).eval()
    for p in [*f.parameters(), *critic.parameters()]:
        p.requires_grad_(False)

    def z(x: Tensor) -> Tensor:
        return critic(f(x))[0].sum()

    graph = make_fx(torch.func.grad(z), tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.rand(2, *shape))
    x = torch.rand(5, *shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(z(x), x)
    assert gradient.abs().amax() > 0
    torch.testing.assert_close(graph(x.detach()), gradient)


# --- critics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("latent", ["logits", "penultimate"])
def test_centre_taps_are_the_whole_function_on_vectors(latent: Any, mode: str) -> None:
    torch.manual_seed(0)
    full = build_critic((6,), 5, latent=latent, form="conv3x3", depth=10, width=1)
    thin = build_critic((6,), 5, latent=latent, form="conv1x1", depth=10, width=1)
    taps = {k: v[:, :, v.shape[2] // 2, v.shape[3] // 2] if v.ndim == 4 else v for k, v in full.state_dict().items()}
    thin.load_state_dict(taps)
    for critic in (full, thin):
        critic.train(mode == "train")
    codes = torch.randn(9, 6, requires_grad=True)
    for _ in range(2):  # the second pass in train mode has moved running statistics behind it
        a, b = full(codes), thin(codes)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a[0].sum(), codes), torch.autograd.grad(b[0].sum(), codes))
    moved = {k: v for k, v in full.state_dict().items() if "running" in k}
    assert moved and all(torch.allclose(thin.state_dict()[k], v, atol=1e-6) for k, v in moved.items())
    assert a[0].shape == (9,) and a[1].shape == (9, 5)


def test_one_seed_gives_both_forms_the_same_function() -> None:
    made = []
    for form in ("conv3x3", "conv1x1"):
        torch.manual_seed(3)
        made.append(WideCritic(4, 4, form=form, depth=10, width=1).eval())  # type: ignore[arg-type]
    codes = torch.randn(3, 4)
    torch.testing.assert_close(made[0](codes), made[1](codes))


def test_the_thin_form_keeps_the_initial_scale_of_3x3_kernels() -> None:
    torch.manual_seed(0)
    critic = WideCritic(10, 10, form="conv1x1", depth=10, width=5)
    block = critic.trunk[3][0]  # type: ignore[index]
    assert block.conv2.weight.detach().std() == pytest.approx(math.sqrt(2 / (9 * 320)), rel=0.03)
    assert block.shortcut.weight.detach().std() == pytest.approx(math.sqrt(2 / 320), rel=0.03)


def test_the_feature_critic_scores_as_a_padded_1x1_convolution_averaged() -> None:
    torch.manual_seed(0)
    critic = FeatureCritic(3, 4, form="conv3x3").eval()
    maps = torch.randn(2, 3, 16, 16)
    last = critic.trunk(maps)
    assert last.shape == (2, 512, 1, 1)
    wider = critic.trunk(torch.randn(2, 3, 64, 32))
    for codes, seen in ((maps, last), (None, wider)):
        weight, bias = critic.score.weight[:, :, None, None], critic.score.bias
        published = F.conv2d(seen, weight, bias, padding=1).mean((2, 3))[:, 0]
        critic.trunk.forward = lambda _, seen=seen: seen  # type: ignore[method-assign]
        torch.testing.assert_close(critic(maps if codes is None else codes)[0], published)


def test_codes_are_logits_or_the_last_features() -> None:
    torch.manual_seed(0)
    lenet = build_network("lenet5", input_shape=MNIST, num_classes=10).eval()
    x = torch.rand(2, *MNIST)
    logits, codes = read_codes(lenet, x, "logits")
    assert torch.equal(logits, lenet(x)) and codes is logits
    logits, codes = read_codes(lenet, x, "penultimate")
    assert torch.equal(logits, lenet(x)) and torch.equal(codes, lenet.features(x))
    wrn = build_network("wrn", input_shape=CIFAR, num_classes=10, depth=10, width=1).eval()
    _, maps = read_codes(wrn, torch.rand(2, *CIFAR), "penultimate")
    assert maps.shape == (2, 64, 8, 8)
    assert build_critic(tuple(maps.shape[1:]), 10, latent="penultimate", form="conv3x3")(maps)[1].shape == (2, 10)


def test_the_thin_form_refuses_maps() -> None:
    with pytest.raises(UserError, match="64x8x8: set critic_form 'conv3x3'"):
        build_critic((64, 8, 8), 10, latent="penultimate", form="conv1x1")


def test_centre_taps_are_taken_in_place() -> None:
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    centre = conv[0].weight[:, :, 1, 1].clone()
    assert torch.equal(centre_taps(conv)[0].weight, centre)
