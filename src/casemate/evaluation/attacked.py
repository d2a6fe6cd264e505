"""What one attack did to a model's images, from the ledger or a file, and what of it counts. No torch at import."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from casemate.errors import UserError
from casemate.evaluation.robustness import contained
from casemate.evaluation.stored import Images, OnDemand, Stored, Take

if TYPE_CHECKING:
    from casemate.evaluation.ledger import Cell
    from casemate.threat import ThreatModel

STORED = ("labels", "x_clean", "x_adv", "prediction_clean", "prediction_adv")


@dataclass(frozen=True)
class Attacked:
    """What an attack did to N images on one model. Predictions are -1 where the image was rejected."""

    model: str
    attack: str
    labels: np.ndarray
    prediction_clean: np.ndarray
    prediction_adv: np.ndarray
    """(N,); or (N, K), where the attack was drawn K times, the first column being the one whose image is kept."""
    targets: np.ndarray | None = None
    """(N,) of a targeted attack; an image whose label is its target does not count."""
    x_clean: Images | None = None
    x_adv: Images | None = None
    """N x C x H x W float32 in [0, 1]; needed for distances and pictures alone. The ledger's are read when they are
    asked for."""
    counts: np.ndarray | None = None
    """(N,) bool: the adversarial image lies in the budget. None: the attack was held to it."""
    oracle: np.ndarray | None = None
    """(N,) what a model that was not attacked says of `x_adv`: an attack that destroys the image wins everything."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        columns = {
            "prediction_clean": self.prediction_clean, "prediction_adv": self.prediction_adv, "targets": self.targets,
            "x_clean": self.x_clean, "x_adv": self.x_adv, "counts": self.counts, "oracle": self.oracle,
        }  # fmt: skip
        for name, values in columns.items():
            if values is not None and len(values) != n:
                raise UserError(f"{self.model}, {self.attack}: {name} has {len(values)} rows for {n} labels")
        if (self.x_clean is None) != (self.x_adv is None):
            raise UserError(f"{self.model}, {self.attack}: distances need both the clean and the adversarial images")

    @property
    def draws(self) -> np.ndarray:
        """N x K predictions."""
        return self.prediction_adv.reshape(len(self.labels), -1)

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: the denominator. Right before the attack, and not at its target already."""
        right: np.ndarray = self.prediction_clean == self.labels
        return right if self.targets is None else right & (self.targets != self.labels)

    @property
    def hits(self) -> np.ndarray:
        """N x K bool: counted images that the attack has where it wants them."""
        draws = self.draws
        wanted = draws != self.labels[:, None] if self.targets is None else draws == self.targets[:, None]
        hits: np.ndarray = wanted & (draws >= 0) & self.right[:, None]
        return hits if self.counts is None else hits & self.counts[:, None]

    @classmethod
    def of_cell(
        cls, model: str, attack: str, cell: Cell, clean: Take | None = None, targets: np.ndarray | None = None,
        within: ThreatModel | None = None,
    ) -> Attacked:  # fmt: skip
        """From the ledger. With `clean`, which gives clean images, the rows whose adversarial image was kept, with
        both images; without, all rows and no image. `targets`: by row of the cell. `within`: only what lies in
        that threat model counts, as of a minimum-norm attack, which goes as far as it must."""
        rows, stored = cell.rows, Stored({}) if clean is None else Stored.of(cell.kept)
        at = np.ones(len(cell), bool) if clean is None else np.isin(rows["index"], list(stored.place))
        if not at.any():
            raise UserError(f"{model}, {attack}: the ledger has no {'row' if clean is None else 'image'} of it")
        return cls(
            model, attack, rows["label"][at], rows["clean_prediction"][at], rows["prediction"][at],
            None if targets is None else targets[at],
            None if clean is None else OnDemand(rows["index"][at], clean),
            None if clean is None else OnDemand(rows["index"][at], stored.take),
            None if within is None else contained(cell, within)[at],
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path, model: str, attack: str) -> Attacked:
        """From a .npz file with labels, x_clean, x_adv, prediction_clean, prediction_adv, and, where there are,
        targets and oracle. A file in which several attacks are mixed (`attack`) is taken for that attack's rows."""
        try:
            with np.load(path, allow_pickle=False) as file:
                kept = {name: file[name] for name in file.files}
            mine = kept["attack"] == attack if "attack" in kept else np.ones(len(kept["labels"]), bool)
            rest = {name: kept[name][mine] for name in ("targets", "oracle") if name in kept}
            return cls(model, attack, **{name: kept[name][mine] for name in STORED}, **rest)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no adversarial images as evaluate keeps them ({error})") from None
