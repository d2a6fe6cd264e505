"""What an exported file says about itself: strings in the model's metadata, JSON where they are not plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from casemate.errors import UserError

SCHEMA = "casemate/1"
Form = Literal["plain", "imt", "limited", "ensemble"]
Variant = Literal["float32", "float16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Layout = Literal["float32-nchw", "uint8-nhwc"]
RANGES: dict[Layout, str] = {"float32-nchw": "[0, 1]", "uint8-nhwc": "[0, 255]"}


@dataclass(frozen=True)
class About:
    """What the exported system is: everything the file says that the system itself does not know.

    `norm` and `radius` (pixel units, images being in [0, 1]) are the threat model it was trained for.
    """

    dataset: str
    classes: tuple[str, ...]
    norm: str
    radius: float
    defense: str = ""
    row: str = ""
    code_version: str = ""


@dataclass(frozen=True)
class Metadata:
    """The whole: `About`, the form, and how images go in.

    purification: the `spec` of IMT, else empty. ensemble: of a randomised system {"draws", "noise", "seed"}, else
    empty. detector: the `spec` of the detector behind it, else empty. variant: what was made of the float32 file.
    """

    about: About
    form: Form
    input_shape: tuple[int, int, int]
    layout: Layout
    purification: Mapping[str, Any] = field(default_factory=dict)
    ensemble: Mapping[str, Any] = field(default_factory=dict)
    detector: Mapping[str, Any] = field(default_factory=dict)
    variant: Variant = "float32"

    def strings(self) -> dict[str, str]:
        """Key -> text, sorted, for `metadata_props`."""
        about = self.about
        values = {
            "schema": SCHEMA, "form": self.form, "dataset": about.dataset, "classes": json.dumps(about.classes),
            "norm": about.norm, "radius": json.dumps(about.radius), "defense": about.defense, "row": about.row,
            "code_version": about.code_version, "input_shape": json.dumps(self.input_shape),
            "input_layout": self.layout, "input_range": RANGES[self.layout],
            "purification": json.dumps(dict(self.purification), sort_keys=True),
            "band": json.dumps(self.purification.get("band")),
        }  # fmt: skip
        if self.ensemble:
            values["ensemble"] = json.dumps(dict(self.ensemble), sort_keys=True)
        if self.detector:
            values["detector"] = json.dumps(dict(self.detector), sort_keys=True)
        if self.variant != "float32":
            values["variant"] = self.variant
        return dict(sorted(values.items()))

    @classmethod
    def read(cls, strings: Mapping[str, str], where: object) -> Metadata | None:
        """From a file's metadata; None if they are not of this project. Raises UserError if they are damaged."""
        schema = strings.get("schema", "")
        if not schema.startswith("casemate/"):
            return None
        if schema != SCHEMA:
            raise UserError(f"{where}: schema {schema!r}, and this version reads {SCHEMA!r}; export it again")
        try:
            about = About(
                strings["dataset"], tuple(map(str, json.loads(strings["classes"]))), strings["norm"],
                float(json.loads(strings["radius"])), strings["defense"], strings["row"], strings["code_version"],
            )  # fmt: skip
            form, layout = strings["form"], strings["input_layout"]
            channels, height, width = map(int, json.loads(strings["input_shape"]))
            purification = dict(json.loads(strings["purification"]))
            ensemble, detector = (dict(json.loads(strings.get(key, "{}"))) for key in ("ensemble", "detector"))
            variant = strings.get("variant", "float32")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: its metadata are damaged ({error!r}); export it again") from None
        if form not in FORMS or layout not in RANGES or variant not in VARIANTS:
            raise UserError(
                f"{where}: unknown form {form!r}, input layout {layout!r} or variant {variant!r}; export it again"
            )
        return cls(about, form, (channels, height, width), layout, purification, ensemble, detector, variant)


def about_card(card: Mapping[str, Any], row: str) -> About:
    """From the card of a trained row."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        code = version("casemate")
    except PackageNotFoundError:
        code = "unknown"
    threat = card["threat"]
    return About(
        card["dataset"], tuple(card["classes"]), threat["norm"], float(threat["radius"]),
        card["defense"]["method"], row, code,
    )  # fmt: skip
