"""The ledger: what every attack did to every image, kept in small immutable files and never computed twice.

A segment holds one chunk of images under one key (see `keys`). It is written aside and renamed, carries checksums,
and is set aside and redone when it does not fit them. Processes need no lock: at worst a chunk is done twice, with
the same result. No wall time, run id or date is in it. Reading needs no torch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from casemate.errors import UserError
from casemate.evaluation import keys, segments
from casemate.evaluation.segments import COLUMNS, Rows

if TYPE_CHECKING:
    from casemate.attacks.base import Attack
    from casemate.evaluation.images import EvaluationSet
    from casemate.system import System
    from casemate.threat import ThreatModel

log = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """The rows of one attack on one view of one system, sorted by image index."""

    key: dict[str, Any]
    rows: Rows
    asked: int
    """How many images were asked for; fewer rows mean that the cell is incomplete."""
    dimensions: int
    """Numbers per image (C x H x W)."""
    kept: tuple[Path, ...] = ()
    """Segments that hold adversarial images."""
    remarks: tuple[str, ...] = ()
    """What the attack warned of when it ran (`attacks.diagnostics`), each line once."""

    def __len__(self) -> int:
        return len(self.rows["index"])

    @property
    def complete(self) -> bool:
        return len(self) == self.asked

    @cached_property
    def clean_error(self) -> np.ndarray:
        """(N,) bool: the clean image is already wrong."""
        wrong: np.ndarray = self.rows["clean_prediction"] != self.rows["label"]
        return wrong

    def predictions(self) -> dict[int, int]:
        """The decision on each image, by index."""
        return dict(zip(self.rows["index"].tolist(), self.rows["prediction"].tolist(), strict=True))

    def at(self, indices: np.ndarray) -> Cell:
        """The rows of these images only."""
        mask = np.isin(self.rows["index"], indices)
        rows = {k: v[mask] for k, v in self.rows.items()}
        return Cell(self.key, rows, len(indices), self.dimensions, self.kept, self.remarks)

    def x_adv(self) -> dict[int, np.ndarray]:
        """Adversarial images (C x H x W float32) by image index, as far as they were kept."""
        found: dict[int, np.ndarray] = {}
        for path in self.kept:
            found.update(segments.read_images(path))
        return found


@dataclass(frozen=True)
class Shard:
    """One of `of` parts of an evaluation: every `of`-th chunk from the `number`-th on, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `2/4`. Raises UserError for anything else."""
        first, slash, second = text.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise UserError(f"a shard is written NUMBER/OF, such as 2/4 for the second of four: got {text!r}")
        return cls(int(first), int(second))

    def holds(self, chunk: int) -> bool:
        """Whether the chunk of that number, counted from 0, is in this part."""
        return chunk % self.of == self.number - 1


@dataclass(frozen=True)
class Ledger:
    """A folder of segments, for chunks of `chunk` images each."""

    root: Path
    chunk: int = 500

    def run(
        self,
        system: System,
        data: EvaluationSet,
        attack: Attack,
        threat: ThreatModel,
        view: str,
        indices: Sequence[int],
        seed: int = 0,
        *,
        keep: int = 0,
        shard: Shard | None = None,
        progress: Progress | None = None,
    ) -> Cell:
        """Attack the images at `indices`, chunk by chunk in that order, except those that are in the ledger already.

        Args:
            keep: store the adversarial images of the chunks that hold the first `keep` indices.
            shard: attack its chunks only; the cell returned holds whatever the ledger has.
            progress: called with the number of images of each chunk as it is done or found.

        Raises UserError if the system does not offer what the attack needs, or answers with what is no number.
        """
        from casemate.evaluation.answers import remarked
        from casemate.evaluation.probes import Identity

        key = keys.cell_key(system, attack, threat, view, seed)
        before: dict[int, int] | None = None
        for start, chunk in self._chunks(indices):
            if shard is not None and not shard.holds(start // self.chunk):
                continue
            images = data.fingerprint(chunk)
            if not self._found(key, images, start < keep, redo=True):
                if before is None and not isinstance(attack, Identity):
                    before = self.clean(system, data, indices, shard=shard).predictions()
                chunk_seed = keys.chunk_seed(attack, images, seed)
                with remarked() as remarks:
                    rows, x_adv = _attack(system, data, attack, threat, view, chunk, chunk_seed, before)
                with_images, plain = self._paths(key, images)
                if start < keep:
                    segments.write(with_images, key, rows, x_adv, remarks)
                else:
                    segments.write(plain, key, rows, remarks=remarks)
            if progress is not None:
                progress(len(chunk))
        return self._collect(key, data, indices)

    def read(
        self, system: System, data: EvaluationSet, attack: Attack, threat: ThreatModel, view: str,
        indices: Sequence[int], seed: int = 0,
    ) -> Cell:  # fmt: skip
        """What the ledger holds of such a run; nothing is computed."""
        return self._collect(keys.cell_key(system, attack, threat, view, seed), data, indices)

    def clean(
        self, system: System, data: EvaluationSet, indices: Sequence[int], *, shard: Shard | None = None,
        progress: Progress | None = None,
    ) -> Cell:  # fmt: skip
        """The system's decisions on the clean images, as the cell of an attack that does nothing."""
        from casemate.evaluation.probes import Identity
        from casemate.threat import ThreatModel

        view = next(iter(system.views()))
        return self.run(
            system, data, Identity(), ThreatModel("linf", 0.0), view, indices, shard=shard, progress=progress
        )

    def _chunks(self, indices: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        for start in range(0, len(indices), self.chunk):
            yield start, indices[start : start + self.chunk]

    # --- segments -------------------------------------------------------------------------------------------

    def _paths(self, key: Mapping[str, Any], images: str) -> tuple[Path, Path]:
        """(with adversarial images, without)."""
        cell = keys.digest(key)
        folder = self.root / cell[:2] / cell
        return folder / f"{images}.images.parquet", folder / f"{images}.parquet"

    def _found(
        self, key: Mapping[str, Any], images: str, with_images: bool, *, redo: bool = False
    ) -> tuple[Path, Rows, list[str]] | None:
        """A sound segment: its file, its rows and its remarks. A torn or foreign one is said, and counts as none; it
        is kept under another name if it is to be redone. What the machine fails at is raised: the segment may be as
        sound as ever."""
        for path in self._paths(key, images)[: 1 if with_images else 2]:
            try:
                return path, *segments.read(path, key, verify_images=with_images)
            except FileNotFoundError:
                continue
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                if not segments.about_content(error):
                    raise
                kind = "foreign" if isinstance(error, segments.ForeignError) else "torn"
                kept = f", kept as {segments.set_aside(path, kind).name}" if redo else ""
                log.warning(
                    "a %s segment of the ledger does not count (%s): %s%s",
                    kind,
                    " ".join(str(error).split()),
                    path,
                    kept,
                )
        return None

    def _collect(self, key: dict[str, Any], data: EvaluationSet, indices: Sequence[int]) -> Cell:
        parts: list[Rows] = []
        kept: list[Path] = []
        remarks: dict[str, None] = {}
        for _, chunk in self._chunks(indices):
            found = self._found(key, data.fingerprint(chunk), with_images=False)
            if found is not None:
                path, part, said = found
                parts.append(part)
                kept += [path] if path.name.endswith(".images.parquet") else []
                remarks |= dict.fromkeys(said)
        empty = {name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}
        rows = {name: np.concatenate([empty[name], *(p[name] for p in parts)]) for name in COLUMNS}
        order = np.argsort(rows["index"], kind="stable")
        rows = {k: v[order] for k, v in rows.items()}
        return Cell(key, rows, len(indices), data.dimensions, tuple(kept), tuple(remarks))


def _attack(
    system: System, data: EvaluationSet, attack: Attack, threat: ThreatModel, view: str, chunk: Sequence[int],
    seed: int, before: Mapping[int, int] | None,
) -> tuple[Rows, np.ndarray]:  # fmt: skip
    """Attack one chunk, whole: noise is drawn for clean errors too, so that no image depends on another's fate.

    `before` holds the clean predictions; None where the attack is the clean image itself.
    """
    from casemate.evaluation.answers import all_finite
    from casemate.threat import untargeted
    from casemate.training.memory import in_pieces

    x, y = data.take(chunk)
    doing = "the clean images" if before is None else f"images that {type(attack).__name__} tried"
    cuttable = None if attack.reads_layers else getattr(system, "classifier", None)
    with full_precision(), all_finite(system, doing):
        result = in_pieces(
            lambda: attack(system, x, untargeted(y), threat, seed, view=view), cuttable, len(x), log.warning
        )
    delta = (result.x_adv - x).flatten(1)
    label, prediction = y.cpu().numpy(), result.prediction.cpu().numpy()
    clean = prediction if before is None else np.array([before[i] for i in chunk])
    rows: Rows = {
        "index": np.asarray(chunk), "label": label, "clean_prediction": clean, "prediction": prediction,
        "success": result.success.cpu().numpy() | (clean != label),
        "linf": delta.abs().amax(1).cpu().numpy(), "l2": delta.norm(dim=1).cpu().numpy(),
        "forwards": result.cost.forwards.cpu().numpy(), "backwards": result.cost.backwards.cpu().numpy(),
        "queries": result.cost.queries.cpu().numpy(),
    }  # fmt: skip
    rows = {name: rows[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return rows, result.x_adv.float().cpu().numpy()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """True float32 on a GPU: an attack's success may hang on margins that TF32 rounds away."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def select(cells: Iterable[tuple[Mapping[str, str], Cell]]) -> pa.Table:
    """One table of the rows of several cells: each cell's labels as text columns, rows sorted, nothing of when or
    where they were made, so the same rows give the same bytes."""
    parts = []
    for labels, cell in cells:
        text = {name: pa.array([value] * len(cell)) for name, value in labels.items()}
        parts.append(pa.table({**text, **{name: pa.array(cell.rows[name]) for name in COLUMNS}}))
    table = pa.concat_tables(parts)
    named = [name for name in table.column_names if name not in COLUMNS]
    return table.sort_by([(name, "ascending") for name in (*named, "index")]).combine_chunks()


def write_selection(table: pa.Table, path: Path) -> None:
    """Write a selection to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
