"""L2L*: the settings of L2L-DA's re-implementation of L2L, and what they come to in a step."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from adversary_toys import learns, look_at
from stepping import LINF
from torch import Tensor

from casemate.defenses.l2l_star import L2LStar
from casemate.networks.base import count_parameters

SMALL = L2LStar(width=4)


def test_its_settings() -> None:
    star = L2LStar()
    assert (star.steps, star.step_factor, star.z_dim, star.diversity) == (1, 1.0, 0, 0.0)
    assert not star.condition and not star.feed_delta and star.gradient_norm == "none"
    assert (star.f_update, star.max_grad_norm, star.generator_lr) == ("joint", 1.0, 0.01), "as L2L-DA"
    with torch.device("meta"):
        assert count_parameters(star.build((3, 32, 32), 10)["generator"]) == 466_048


def test_passes() -> None:
    """The table has 1 + 2 + 3: the two identical halves are one pass here, and still two of f's three."""
    looked = look_at(SMALL)
    assert looked.images == (2, 3)
    assert looked.f.train == [False, False, True] and looked.f.backwards == 3
    assert looked.g.train == [True] and looked.g.backwards == 1
    assert [players for players, _ in looked.updates] == [("generator",), ("classifier",)]


def test_the_step_by_hand() -> None:
    """x_adv = clip(x + radius tanh(U-Net([x, grad / 100]))); f learns [x; x_adv; x_adv]."""
    looked = look_at(SMALL)
    f, g = copy.deepcopy(looked.before["classifier"]), copy.deepcopy(looked.before["generator"])
    at = looked.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(f.eval()(at), looked.y, reduction="sum"), at)
    x_adv: Tensor = (looked.x + 0.1 * g(torch.cat([looked.x, gradient / 100], 1))).clamp(0, 1).detach()
    assert bool(LINF.contains(x_adv, looked.x).all()) and not torch.equal(x_adv, looked.x)
    seen = looked.f.inputs[-1]
    torch.testing.assert_close(seen, torch.cat([looked.x, x_adv, x_adv]), rtol=0, atol=1e-6)
    (_, attackers), (_, loss) = looked.updates
    torch.testing.assert_close(torch.tensor(attackers), -F.cross_entropy(f(x_adv), looked.y).detach())
    expected = F.cross_entropy(f.train()(seen), looked.y.repeat(3)).detach()
    torch.testing.assert_close(torch.tensor(loss), expected)


def test_it_learns_one_batch() -> None:
    first, last, accuracy = learns(SMALL)
    assert last < first / 3 and accuracy == 1
