"""The vocabulary of parameters: the only types a registered class may use for its fields.

Every attack, defense, network and dataset is a `@spec` class: a frozen dataclass that pydantic validates.
`casemate.registry` reads the same annotations from the source, so params.yaml is checked without importing torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as _dataclass

T = TypeVar("T")


def fraction(value: Any) -> Any:
    """`"8/255"` -> 0.03137...; numbers pass through. Anything else is left for pydantic to refuse."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            number = float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is not a number or a fraction such as 8/255") from None
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not finite")
        return number
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def check_radius(norm: str, radius: float) -> None:
    """Raise ValueError for a radius in linf that lets every pixel be anything: pixels are in [0, 1]."""
    if norm == "linf" and radius >= 1:
        shown = f"; did you mean {radius:g}/255?" if radius <= 255 else ""
        raise ValueError(f"radius {radius:g} in linf: pixels are in [0, 1]{shown}")


Real = Annotated[float, BeforeValidator(fraction), Field(allow_inf_nan=False)]
NonNegative = Annotated[Real, Field(ge=0)]
Positive = Annotated[Real, Field(gt=0)]
Radius = NonNegative  # in pixel units, images being in [0, 1]
Unit = Annotated[Real, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]

VOCABULARY: dict[str, Any] = {
    "Real": Real, "NonNegative": NonNegative, "Positive": Positive, "Radius": Radius, "Unit": Unit,
    "Natural": Natural, "Count": Count, "Seed": Seed, "Flag": Flag, "Text": Text,
    "int": int, "float": float, "bool": bool, "str": str, "None": None,
}  # fmt: skip


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose values pydantic checks; unknown keywords are errors."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    make: Callable[[type[T]], Any] = _dataclass(frozen=True, kw_only=True, config=config)
    made: type[T] = make(cls)
    return made
