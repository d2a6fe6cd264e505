"""The release gate: is the very file that would be served as good as the evaluation says?

The file is compared with PyTorch, and attacked as it is served. What is left of the images must not be further under
what the evaluation's worst case leaves of the same images than a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from casemate.deploy.card import (
    MODEL,
    Card,
    Check,
    Gate,
    Input,
    Provenance,
    Rate,
    Threat,
    Worst,
    file_sha256,
)
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.served import Fallen
from casemate.errors import UserError
from casemate.threat import ThreatModel


@dataclass(frozen=True)
class Table:
    """The adaptive worst case of a system, image by image: `index` (n,) sorted, `fallen` (n,) bool; and the attacks
    that it is over."""

    index: np.ndarray
    fallen: np.ndarray
    attacks: tuple[str, ...]

    def at(self, indices: np.ndarray) -> np.ndarray:
        """(N,) bool: `fallen` of these images, all of which must be in the table."""
        place = np.searchsorted(self.index, indices)
        if not np.array_equal(self.index[np.minimum(place, len(self.index) - 1)], indices):
            raise ValueError("an image that the table does not have")
        found: np.ndarray = self.fallen[place]
        return found


def read_table(ledger: Path, system: str, threat: ThreatModel, dimensions: int) -> Table | None:
    """The worst case over every attack in an evaluated row's `ledger.parquet`, as `robustness.worst_case` has it.

    None if no attack was run on that system. `dimensions` is C x H x W of its images.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from casemate.evaluation import robustness
    from casemate.evaluation.ledger import Cell
    from casemate.evaluation.segments import COLUMNS

    rows = pq.read_table(ledger)
    rows = rows.filter(pc.equal(rows["system"], system))
    kinds = [rows[name].to_numpy(zero_copy_only=False) for name in ("suite", "attack", "view", "threat")]
    values = {name: rows[name].to_numpy(zero_copy_only=False) for name in COLUMNS}
    cells: dict[tuple[str, ...], Cell] = {}
    for kind in sorted({*zip(*kinds, strict=True)}):
        if kind[0] in ("", "sweep"):
            continue
        mine = np.all([column == value for column, value in zip(kinds, kind, strict=True)], axis=0)
        part = {name: column[mine] for name, column in values.items()}
        order = np.argsort(part["index"], kind="stable")
        cells[kind] = Cell({}, {k: v[order] for k, v in part.items()}, int(mine.sum()), dimensions)
    own = [cell for kind, cell in cells.items() if kind[3] == str(threat)]
    if not own:
        return None
    images = robustness.common_images(own)
    # a budget of its own takes part where it covers the images, as in `worst.worst_cases`
    taking = {k: c for k, c in cells.items() if k[3] == str(threat) or np.isin(images, c.rows["index"]).all()}
    fallen = np.any([robustness.fallen(cell.at(images), threat) for cell in taking.values()], axis=0)
    return Table(images, fallen, tuple(dict.fromkeys(kind[1] for kind in taking)))


def judge(
    found: Fallen, table: Table | None, indices: np.ndarray, margin: float, parity: Sequence[Mapping[str, Any]]
) -> Gate:
    """The gate's verdict. `found` is of the images `indices` (in its order), `parity` the checks of the parity report
    (of a variant none: it is another function, and only its robustness counts)."""
    from casemate.evaluation.robustness import rate

    checks = [Check(**{key: check[key] for key in Check.model_fields}) for check in parity]
    served = Worst(**rate(found.all), attacks=tuple(found.attacks))
    if table is None:
        checks.append(Check(
            name="evaluated", value=0.0, bound=1.0, at_least=True, passed=False,
            detail="adaptive worst cases that the evaluation has of this system",
        ))  # fmt: skip
        return Gate(passed=False, margin=margin, served=served, table=None, checks=tuple(checks))
    same = Worst(**rate(table.at(indices)), attacks=table.attacks)
    return _against(served, same, margin, checks, "the evaluation leaves")


def judge_by_source(found: Fallen, margin: float, parity: Sequence[Mapping[str, Any]]) -> Gate:
    """As `judge`, for a system that no evaluation knows: the table is what the attacks on the PyTorch system leave of
    the very images that the file was attacked with. Without such attacks the gate fails, as without a table."""
    from casemate.evaluation.robustness import rate

    if not found.source:
        return judge(found, None, np.arange(len(found.clean)), margin, parity)
    checks = [Check(**{key: check[key] for key in Check.model_fields}) for check in parity]
    served = Worst(**rate(found.all), attacks=tuple(found.attacks))
    down = np.any([found.clean, *found.source.values()], axis=0)
    table = Worst(**rate(down), attacks=tuple(found.source))
    return _against(served, table, margin, checks, "the same attack leaves PyTorch")


def _against(served: Worst, table: Worst, margin: float, checks: list[Check], words: str) -> Gate:
    """The verdict on `checks` and on what is `served`, against the `table` of the same images; `words` say whose."""
    bound = table.accuracy - margin
    checks.append(Check(
        name="served", value=served.accuracy, bound=bound, at_least=True, passed=served.accuracy >= bound - 1e-12,
        detail=f"share left of {served.n} images, attacked as served; of these {words} {table.accuracy:.4g}",
    ))  # fmt: skip
    return Gate(
        passed=all(check.passed for check in checks), margin=margin, served=served, table=table, checks=tuple(checks)
    )


def make_card(
    file: OnnxSystem, trained: Mapping[str, Any], evaluation: Mapping[str, Any], mode: str, gate: Gate | None
) -> Card:
    """The card of an exported file. `trained` is the card of the row's training, `evaluation` the row's evaluate/ROW
    report. Raises UserError for a file that is none of ours or is of another data set than the row."""
    entry = system_of(evaluation, mode)
    clean, verdict = (None, "not run") if entry is None else (entry.get("clean"), entry["gate"]["verdict"])
    return _card(
        file, trained, mode, gate, profile=evaluation["profile"], budget=evaluation["budget"],
        threat=Threat(norm=evaluation["threat"]["norm"], radius=evaluation["threat"]["radius"]),
        clean=None if clean is None else Rate(**{key: clean[key] for key in Rate.model_fields}),
        robust={} if entry is None else worst_of(entry), verdict=verdict,
    )  # fmt: skip


def detector_card(
    file: OnnxSystem, trained: Mapping[str, Any], detector: str, found: Fallen, gate: Gate, threat: ThreatModel, *,
    profile: str, budget: float,
) -> Card:  # fmt: skip
    """The card of a classifier with a detector beside it, all of whose numbers are those of the release gate. Raises
    as `make_card`."""
    from casemate.evaluation.robustness import rate

    made = _card(
        file, trained, detector, gate, profile=profile, budget=budget,
        threat=Threat(norm=threat.norm, radius=threat.radius), clean=Rate(**rate(found.clean)), robust={},
        verdict="not run",
    )  # fmt: skip
    return made.model_copy(update={"form": "detector"})


def _card(
    file: OnnxSystem, trained: Mapping[str, Any], mode: str, gate: Gate | None, *, profile: str, budget: float,
    threat: Threat, clean: Rate | None, robust: dict[str, Worst], verdict: str,
) -> Card:  # fmt: skip
    metadata = file.metadata
    if metadata is None:
        raise UserError(f"{file.path} was not exported by casemate, so there is no card for it")
    about = metadata.about
    if about.dataset != trained["dataset"] or list(about.classes) != list(trained["classes"]):
        raise UserError(f"{file.path} is for {about.dataset}, and its row for {trained['dataset']}; export it again")
    return Card(
        file=MODEL, sha256=file_sha256(file.path), size=file.path.stat().st_size, dataset=about.dataset,
        classes=about.classes,
        input=Input(name=file.model.input.name, shape=file.model.input.shape, layout=metadata.layout),
        outputs=tuple(file.outputs), form=metadata.form, variant=metadata.variant, threat=threat, clean=clean,
        robust=robust, verdict=verdict, gate=gate,
        provenance=Provenance(
            profile=profile, row=about.row, mode=mode, method=about.defense,
            network=trained["network"]["name"], data_checksum=trained["data_checksum"], seed=trained.get("seed"),
            epochs=trained.get("effective_epochs"), budget=budget, code_version=about.code_version,
        ),
    )  # fmt: skip


def system_of(evaluation: Mapping[str, Any], mode: str) -> Mapping[str, Any] | None:
    """The entry of an inference mode in an evaluate/ROW report."""
    return next((entry for entry in evaluation["systems"] if entry["mode"] == mode), None)


def worst_of(entry: Mapping[str, Any]) -> dict[str, Worst]:
    """The adaptive worst case by suite, of those that are whole."""
    found = {suite: faces["adaptive"] for suite, faces in entry["worst"].items()}
    return {
        suite: Worst(**{key: worst[key] for key in Worst.model_fields})
        for suite, worst in found.items() if worst is not None and not worst["incomplete"]
    }  # fmt: skip
