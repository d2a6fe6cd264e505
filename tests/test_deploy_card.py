"""The card of a released file: written, read, and refused when the file is another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from casemate.deploy import card as cards
from casemate.deploy.card import Card, Check, Gate, Input, Provenance, Rate, Threat, Worst
from casemate.errors import UserError

BYTES = b"not really a model, but a file with a hash"


def made(**changes: object) -> Card:
    """A card of `BYTES`."""
    check = Check(name="served", value=0.9, bound=0.88, at_least=True, passed=True, detail="what is left")
    worst = Worst(accuracy=0.9, low=0.8, high=0.95, n=100, attacks=("apgd", "square"))
    fields = {
        "file": "model.onnx", "sha256": hashlib.sha256(BYTES).hexdigest(), "size": len(BYTES), "dataset": "digits",
        "classes": ("zero", "one"), "input": Input(name="image", shape=(1, 8, 8), layout="uint8-nhwc"),
        "outputs": ("logits", "probabilities"), "form": "plain", "variant": "float32",
        "threat": Threat(norm="linf", radius=0.2), "clean": Rate(accuracy=0.99, low=0.97, high=1.0, n=500),
        "robust": {"core": worst, "all": worst}, "verdict": "ok",
        "gate": Gate(passed=True, margin=0.02, served=worst, table=worst, checks=(check,)),
        "provenance": Provenance(
            profile="quick", row="at_pgd", mode="plain", method="at_pgd", network="digits_cnn",
            data_checksum="5b81" * 8, seed=0, epochs=3.0, budget=0.5, code_version="0.1",
        ),
    }  # fmt: skip
    return Card.model_validate({**fields, **changes})


@pytest.fixture
def released(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(BYTES)
    cards.write(made(), tmp_path)
    return tmp_path


def test_a_card_comes_back_as_it_was_written(released: Path) -> None:
    assert cards.verify(released) == made()
    assert cards.verify(released / "model.onnx") == made()
    assert sorted(p.name for p in released.iterdir()) == ["MODEL_CARD.md", "card.json", "model.onnx"]


def test_one_changed_byte_is_refused(released: Path) -> None:
    (released / "model.onnx").write_bytes(BYTES[:-1] + b"?")
    with pytest.raises(UserError, match=r"model.onnx is not the file that .*card.json was written for"):
        cards.verify(released)


def test_missing_pieces_are_named(released: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card.json is the card of 'model.onnx', not of 'other.onnx'"):
        (released / "other.onnx").write_bytes(BYTES)
        cards.verify(released / "other.onnx")
    (released / "card.json").unlink()
    assert cards.find(released) is None
    with pytest.raises(UserError, match=r"model.onnx has no card.json beside it"):
        cards.verify(released)
    (released / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"model.onnx does not exist"):
        cards.verify(released)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {**c, "schema": "casemate-card/9"}, "not a model card of this version .*schema"),
        (lambda c: {**c, "surprise": 1}, "not a model card of this version .*surprise"),
        (lambda c: {k: v for k, v in c.items() if k != "sha256"}, "not a model card of this version .*sha256"),
        (lambda c: {**c, "classes": 3}, "not a model card of this version .*classes"),
        (lambda c: [], "not a model card of this version"),
    ],
)
def test_a_damaged_card_is_one_line(released: Path, change: object, said: str) -> None:
    content = json.loads((released / "card.json").read_text())
    (released / "card.json").write_text(json.dumps(change(content)))  # type: ignore[operator]
    with pytest.raises(UserError, match=said) as error:
        cards.verify(released)
    assert "\n" not in str(error.value)
    (released / "card.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        cards.verify(released)


def test_the_text_says_what_a_user_must_know(released: Path) -> None:
    text = (released / "MODEL_CARD.md").read_text()
    assert "| worst case, all (2 attacks) | 90.00 % | 80.0 to 95.0 | 100 |" in text
    assert "N x 8 x 8 x 1 uint8 in [0, 255]" in text
    assert "scaled-down run (budget 0.5)" in text
    assert "Resizing is not in the file" in text
    assert hashlib.sha256(BYTES).hexdigest() in text


def test_the_text_of_a_failed_or_unreliable_file_warns() -> None:
    from casemate.deploy.card_text import model_card

    good = made()
    assert good.gate is not None
    assert "do not serve" not in model_card(good)
    assert "do not serve" in model_card(made(gate=good.gate.model_copy(update={"passed": False})))
    assert "not robustness" in model_card(made(verdict="unreliable"))
    assert "has not been through it" in model_card(made(gate=None))
    assert "no robust accuracy" in model_card(made(robust={}))


def test_the_text_says_which_attacks_do_not_count() -> None:
    from casemate.deploy.card_text import model_card

    def worst(*attacks: str) -> Worst:
        return Worst(accuracy=0.9, low=0.8, high=0.95, n=100, attacks=attacks)

    core, beyond = worst("pgd", "cw_l2"), worst("adef", "stadv")
    text = model_card(made(robust={"core": core, "beyond": beyond, "all": worst("core/pgd")}))
    assert "a budget of its own counts only where its image lies inside linf 0.2" in text
    assert "leaves out what was run on fewer images: `core/cw_l2`, all of `beyond`." in text
    whole = model_card(made(robust={"core": core, "all": worst("core/pgd", "core/cw_l2")}))
    assert "leaves out" not in whole and "budget of its own" not in model_card(made(robust={}))
