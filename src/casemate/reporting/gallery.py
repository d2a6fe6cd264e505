"""The grid of clean, adversarial, difference and purified images with what the system takes them for."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from casemate.errors import UserError
from casemate.reporting.theme import Draw, Theme, canvas

SHOWN = 10
WRONG = "#a33a06"
NEEDED = ("indices", "labels", "x_adv", "x_clean", "prediction_clean", "prediction_adv")
KNOWN = (*NEEDED, "x_purified")
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image of the gallery; pictures are data URIs, `*_right` says whether the prediction is the label."""

    index: int
    label: str
    pictures: dict[str, str]
    prediction_clean: str
    prediction_adv: str
    clean_right: bool
    adv_right: bool


@dataclass(frozen=True)
class Gallery:
    """Up to ten samples of different classes. `scale`: the difference (pixel units) drawn as black or white."""

    kinds: tuple[str, ...]
    samples: tuple[Sample, ...]
    images: dict[str, Pixels]
    """Kind -> n x C x H x W in [0, 1]."""
    scale: float


def gallery(path: Path, classes: tuple[str | int, ...], radius: float) -> Gallery | None:
    """Read `adversarial.npz` and pick the first image of each class, until ten are found. `radius` (linf, pixel
    units) scales the differences; larger differences widen the scale. None if the file holds no image; raises
    UserError if it cannot be read."""
    stored = _load(path)
    if not stored or not len(stored["labels"]):
        return None
    chosen = pick(stored["labels"])
    clean, adversarial = (_pixels(stored[key], chosen) for key in ("x_clean", "x_adv"))
    scale = max(float(np.abs(adversarial - clean).max(initial=0.0)), radius, 1e-9)
    images = {"clean": clean, "adversarial": adversarial, "difference": 0.5 + (adversarial - clean) / (2 * scale)}
    if "x_purified" in stored:
        images["purified"] = _pixels(stored["x_purified"], chosen)
    names = {key: [_name(int(i), classes) for i in stored[key][chosen]] for key in NEEDED if "x_" not in key}
    samples = [
        Sample(
            index=int(stored["indices"][at]), label=names["labels"][i],
            pictures={kind: data_uri(pixels[i]) for kind, pixels in images.items()},
            prediction_clean=names["prediction_clean"][i], prediction_adv=names["prediction_adv"][i],
            clean_right=bool(stored["prediction_clean"][at] == stored["labels"][at]),
            adv_right=bool(stored["prediction_adv"][at] == stored["labels"][at]),
        )
        for i, at in enumerate(chosen)
    ]  # fmt: skip
    return Gallery(tuple(images), tuple(samples), images, scale)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as found:
            stored = {key: found[key] for key in found.files if key in KNOWN}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} cannot be read: run the evaluate stage of that row again") from None
    missing = [key for key in NEEDED if key not in stored]
    if stored and missing:
        raise UserError(f"{path} has no {missing[0]}: run the evaluate stage of that row again")
    return stored


def pick(labels: NDArray[Any], shown: int = SHOWN) -> list[int]:
    """Positions of the first image of each class, then of further images, `shown` at most; sorted by class."""
    _, first = np.unique(labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(labels)), first)
    chosen = [*sorted(first.tolist())[:shown], *rest.tolist()][:shown]
    return sorted(chosen, key=lambda at: (labels[at], at))


def _pixels(images: NDArray[Any], chosen: list[int]) -> Pixels:
    kept: Pixels = np.clip(images[chosen].astype(np.float32), 0.0, 1.0)
    return kept


def _name(label: int, classes: tuple[str | int, ...]) -> str:
    if label < 0:
        return "rejected"
    return str(classes[label]) if label < len(classes) else str(label)


def _bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """C x H x W in [0, 1] -> H x W or H x W x 3 grey levels."""
    levels = np.round(255 * pixels).astype(np.uint8)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels[:3].transpose(1, 2, 0))


def data_uri(pixels: Pixels) -> str:
    """A picture (C x H x W in [0, 1]) as a PNG inside its own address."""
    stream = io.BytesIO()
    Image.fromarray(_bytes(pixels)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def gallery_figure(shown: Gallery) -> Draw:
    """The same grid as one figure."""

    def draw(theme: Theme, width: int) -> Figure:
        columns = len(shown.samples)
        figure = canvas(width, (width - 80) / columns * 1.22 * len(shown.kinds) + 10)
        axes = figure.subplots()
        for y, kind in enumerate(shown.kinds):
            for x, sample in enumerate(shown.samples):
                corners = (x, x + 0.94, 1.22 * y + 0.94, 1.22 * y)
                axes.imshow(
                    _bytes(shown.images[kind][x]),
                    cmap="gray",
                    vmin=0,
                    vmax=255,
                    extent=corners,
                    interpolation="nearest",
                )
                if kind in ("clean", "adversarial"):
                    right = sample.clean_right if kind == "clean" else sample.adv_right
                    said = sample.prediction_clean if kind == "clean" else sample.prediction_adv
                    look: dict[str, Any] = {"color": theme.muted} if right else {"color": WRONG, "fontweight": "bold"}
                    axes.text(x + 0.47, 1.22 * y + 1.08, said[:12], ha="center", va="center", fontsize=9, **look)
        axes.set(xlim=(0, columns), ylim=(1.22 * len(shown.kinds), 0))
        axes.set_yticks([1.22 * y + 0.47 for y in range(len(shown.kinds))], shown.kinds)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        return figure

    return draw
