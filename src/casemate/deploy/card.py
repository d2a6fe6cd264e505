"""The card of a released model: `card.json` beside `model.onnx`. Servers check the file against it before they start.

A released folder holds `model.onnx`, `card.json` and, for people, `MODEL_CARD.md`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from casemate.errors import UserError

SCHEMA: Literal["casemate-card/1"] = "casemate-card/1"
MODEL, CARD, TEXT = "model.onnx", "card.json", "MODEL_CARD.md"
CHUNK = 1 << 20


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rate(Part):
    """A share of `n` images in [0, 1], with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    n: int


class Worst(Rate):
    """What is left when each image meets every one of `attacks`; clean errors count as fallen."""

    attacks: tuple[str, ...]


class Check(Part):
    """One bound of the gate: `value` must not exceed `bound`, or with `at_least` not fall below it."""

    name: str
    value: float
    bound: float
    at_least: bool
    passed: bool
    detail: str


class Gate(Part):
    """What the release gate found on the very file. `served` is what is left of the images that it attacked;
    `table` is the evaluation's worst case on the same images, and `margin` how far `served` may fall under it."""

    passed: bool
    margin: float
    served: Worst
    table: Worst | None
    checks: tuple[Check, ...]


class Threat(Part):
    """The ball that the model was tested in; `radius` in pixel units, images being in [0, 1]."""

    norm: str
    radius: float


class Input(Part):
    """The one input. `shape` is (channels, height, width) whatever the layout; no resizing is in the file."""

    name: str
    shape: tuple[int, int, int]
    layout: Literal["float32-nchw", "uint8-nhwc"]


class Provenance(Part):
    """Where the model comes from. `budget` below 1: a scaled-down run, whose numbers are those of one."""

    profile: str
    row: str
    mode: str
    method: str
    network: str
    data_checksum: str
    seed: int | None
    epochs: float | None
    budget: float
    code_version: str


class Card(Part):
    """What a released file is, and what was measured on it.

    form: "plain", "imt" and so on: what the file does besides the classifier's forward pass. variant: "float32", or
    the precision that it was changed to afterwards. size: bytes. robust: the evaluation's adaptive worst case by
    suite, "all" being that over every suite. verdict: the masking gate's word on that evaluation. gate is None where
    the file has not been through the release gate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    card_schema: Literal["casemate-card/1"] = Field(default=SCHEMA, alias="schema")
    file: str
    sha256: str
    size: int
    dataset: str
    classes: tuple[str, ...]
    input: Input
    outputs: tuple[str, ...]
    form: str
    variant: str
    threat: Threat
    clean: Rate | None
    robust: dict[str, Worst]
    verdict: str
    gate: Gate | None
    provenance: Provenance

    def text(self) -> str:
        """As JSON, the same for equal cards."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"


def file_sha256(path: Path) -> str:
    """Of a file's bytes, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def model_path(path: Path | str) -> Path:
    """`path`, or the model in the released folder `path`."""
    path = Path(path)
    return path / MODEL if path.is_dir() else path


def find(path: Path | str) -> Path | None:
    """The card of a model file or released folder; None if it has none."""
    card = model_path(path).with_name(CARD)
    return card if card.is_file() else None


def read(path: Path) -> Card:
    """A `card.json`. Raises UserError if it is not one of this version."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; 'python -m pipeline.release' writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Card:
    """A card's text. `name`: what an error calls it. Raises UserError if it is not a card of this version."""
    try:
        return Card.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{name} is not a model card of this version ({where}: {first['msg']})") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None


def verify(path: Path | str) -> Card:
    """The card of a model file or released folder, if the file is the very one that the card was written for.

    Raises UserError if either is missing, the card is damaged or of another file, or the file's SHA-256 differs.
    """
    model = model_path(path)
    if not model.is_file():
        raise UserError(f"{model} does not exist")
    found = find(model)
    if found is None:
        raise UserError(f"{model} has no {CARD} beside it: nothing says what it was tested for; release it first")
    card = read(found)
    if card.file != model.name:
        raise UserError(f"{found} is the card of {card.file!r}, not of {model.name!r}")
    return hold(model, card, str(found))


def hold(model: Path, card: Card, name: str) -> Card:
    """`card`, if `model` has its SHA-256. `name`: what an error calls the card. Raises UserError if it has not."""
    digest = file_sha256(model)
    if digest != card.sha256:
        raise UserError(
            f"{model} is not the file that {name} was written for (sha256 {digest[:12]}..., the card says "
            f"{card.sha256[:12]}...): it was changed or exchanged after its release"
        )
    return card


def write(card: Card, folder: Path) -> None:
    """`card.json` and `MODEL_CARD.md` into `folder`, each under a temporary name and renamed."""
    from casemate.deploy.card_text import model_card

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((CARD, card.text()), (TEXT, model_card(card))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
