"""The ledger: keys, resume, torn segments, kill -9, several processes, shards, determinism."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_toys import BALL, Jitter, images, linear, segments
from torch import Tensor

from casemate.attacks.base import Cost
from casemate.attacks.diagnostics import AttackWarning
from casemate.errors import UserError
from casemate.evaluation import keys
from casemate.evaluation import segments as store
from casemate.evaluation.images import EvaluationSet, evaluation_order
from casemate.evaluation.ledger import Cell, Ledger, Shard, select, write_selection
from casemate.evaluation.probes import Identity, RandomCorners
from casemate.system import View
from casemate.threat import Goal, ThreatModel

SYSTEM = linear()
DATA = images(SYSTEM)
ORDER = evaluation_order(60)
CHUNK = 10


@pytest.fixture(autouse=True)
def fresh() -> None:
    Jitter.chunks.clear()
    Jitter.pause = 0.0


def run(root: Path, indices: list[int] | None = None, keep: int = 0) -> Cell:
    where = ORDER if indices is None else indices
    return Ledger(root, CHUNK).run(SYSTEM, DATA, Jitter(), BALL, "adaptive", where, 7, keep=keep)


def same(a: Cell, b: Cell) -> bool:
    return a.rows.keys() == b.rows.keys() and all(np.array_equal(a.rows[k], b.rows[k]) for k in a.rows)


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_are_what_the_system_says(tmp_path: Path) -> None:
    cell = run(tmp_path, keep=60)
    x, y = DATA.take(cell.rows["index"])
    adversarial = cell.x_adv()
    x_adv = torch.from_numpy(np.stack([adversarial[i] for i in cell.rows["index"]]))
    assert np.array_equal(cell.rows["index"], np.arange(60))
    assert np.array_equal(cell.rows["clean_prediction"], SYSTEM.decide(x))
    assert np.array_equal(cell.rows["prediction"], SYSTEM.decide(x_adv))
    wrong = (SYSTEM.decide(x) != y) | (SYSTEM.decide(x_adv) != y)
    assert np.array_equal(cell.rows["success"], wrong)
    assert cell.rows["success"][:5].all() and 5 < cell.rows["success"].sum() < 60
    assert np.allclose(cell.rows["linf"], (x_adv - x).abs().flatten(1).amax(1))
    assert np.allclose(cell.rows["l2"], (x_adv - x).flatten(1).norm(dim=1))
    assert (cell.rows["queries"] == 1).all() and (cell.rows["forwards"] == 1).all()  # one look, one verification


def test_the_clean_cell_is_the_clean_accuracy(tmp_path: Path) -> None:
    clean = Ledger(tmp_path, CHUNK).clean(SYSTEM, DATA, ORDER)
    assert clean.rows["success"].sum() == clean.clean_error.sum() == 5
    assert clean.rows["linf"].max() == 0


def test_the_order_of_images_is_nested() -> None:
    assert sorted(evaluation_order(1000)) == list(range(1000))
    assert [i for i in evaluation_order(1000) if i < 60] == evaluation_order(60)


# --- resume -------------------------------------------------------------------------------------------------


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    first = run(tmp_path, ORDER[:30])
    assert Jitter.chunks == [10, 10, 10]
    whole = run(tmp_path)
    assert len(Jitter.chunks) == 6
    assert same(run(tmp_path), whole) and len(Jitter.chunks) == 6
    assert same(whole.at(first.rows["index"]), first)


class Suspicious(Jitter):
    """Warns of what it saw, and of a thing that is nobody's business here."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        warnings.warn("no slope anywhere", AttackWarning, stacklevel=1)
        warnings.warn("no slope anywhere", AttackWarning, stacklevel=1)
        warnings.warn(f"{len(x)} images looked odd", AttackWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return super().run(view, x, goal, threat, seed, cost)


def test_what_an_attack_warns_of_is_kept_with_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger, told = Ledger(tmp_path, CHUNK), ("no slope anywhere", "10 images looked odd", "5 images looked odd")
    with pytest.warns(UserWarning, match="something else") as shown:
        cell = ledger.run(SYSTEM, DATA, Suspicious(), BALL, "adaptive", ORDER[:25], 7, keep=5)
    assert cell.remarks == told and cell.at(np.array(ORDER[:3])).remarks == told
    assert {str(w.message) for w in shown} == {"something else"}
    assert caplog.text.count("no slope anywhere") == 3  # once a chunk
    read = ledger.read(SYSTEM, DATA, Suspicious(), BALL, "adaptive", ORDER[:25], 7)
    assert read.remarks == told and run(tmp_path).remarks == ()


class Inside(Jitter):
    reads_layers: ClassVar[bool] = True

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_an_attack_that_reads_layers_is_not_cut_where_memory_is_short(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10 images at once, which cannot be cut here: .*--chunk"):
        Ledger(tmp_path, CHUNK).run(SYSTEM, DATA, Inside(), BALL, "adaptive", ORDER[:20])


def test_progress_counts_found_and_computed_images(tmp_path: Path) -> None:
    run(tmp_path, ORDER[:20])
    seen: list[int] = []
    Ledger(tmp_path, CHUNK).run(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER[:35], 7, progress=seen.append)
    assert seen == [10, 10, 10, 5]


def test_reading_computes_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path, ORDER[:20])
    found = Ledger(tmp_path, CHUNK).read(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER, 7)
    assert (len(found), found.asked, found.complete) == (20, 60, False)
    assert Jitter.chunks == [10, 10]


def test_shards_by_image_range_join(tmp_path: Path) -> None:
    run(tmp_path / "shards", ORDER[40:])
    run(tmp_path / "shards", ORDER[:40])
    Jitter.chunks.clear()
    joined = run(tmp_path / "shards")
    assert not Jitter.chunks
    assert same(joined, run(tmp_path / "whole"))


def test_adversarial_images_are_kept_when_asked(tmp_path: Path) -> None:
    assert not run(tmp_path).x_adv()
    kept = run(tmp_path, keep=15)
    assert len(Jitter.chunks) == 6 + 2  # the two chunks that hold the first 15, again
    assert set(kept.x_adv()) == set(ORDER[:20])
    assert same(kept, run(tmp_path / "other"))
    run(tmp_path)
    assert len(Jitter.chunks) == 6 + 2 + 6


# --- torn segments ------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 3))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def another_cell(path: Path) -> None:
    """A sound file of another key in its place."""
    where = path.parent.parent.parent / "foreign"
    Ledger(where, CHUNK).run(SYSTEM, DATA, Jitter(flavour=9), BALL, "adaptive", ORDER[:10], 7)
    attacked = [p for p in segments(where) if "flavour" in pq.read_schema(p).metadata[b"key"].decode()]
    path.write_bytes(attacked[0].read_bytes())


def altered_rows(path: Path) -> None:
    """A sound file whose rows are not those of its checksum."""
    table = pq.read_table(path)
    at = table.column_names.index("success")
    pq.write_table(table.set_column(at, "success", [np.ones(len(table), bool)]), path)


@pytest.mark.parametrize("tear", [truncate, empty, flip, another_cell, altered_rows])
def test_a_torn_segment_is_said_and_redone(tmp_path: Path, tear: object, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path / "a", keep=60)
    victim = next(p for p in segments(tmp_path / "a") if ".images" in p.name)
    tear(victim)  # type: ignore[operator]
    Jitter.chunks.clear()
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path / "a", keep=60)
    kind = "foreign" if tear is another_cell else "torn"
    assert Jitter.chunks.count(10) >= 1 and f"a {kind} segment" in caplog.text and victim.name in caplog.text
    assert ("of another attack" in caplog.text) is (tear is another_cell)
    assert [p.name for p in victim.parent.glob("*.*") if p.suffix == f".{kind}"] == [f"{victim.name}.{kind}"]
    assert same(again, whole) and again.x_adv().keys() == whole.x_adv().keys()


def test_a_segment_of_other_weights_says_so_and_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A look does not touch it, a run puts it aside, and a second one does not overwrite the first."""
    other = linear(1)
    run(tmp_path, ORDER[:10])
    Ledger(tmp_path, CHUNK).run(other, DATA, Jitter(), BALL, "adaptive", ORDER[:10], 7)
    by_system = {p: json.loads(pq.read_schema(p).metadata[b"key"])["system"] for p in segments(tmp_path)}
    mine = next(p for p, s in by_system.items() if s == SYSTEM.hash() and "Jitter" in key_of(p))
    theirs = next(p for p, s in by_system.items() if s == other.hash() and "Jitter" in key_of(p))
    for aside in (f"{mine.name}.foreign", f"{mine.name}.foreign.2"):
        mine.write_bytes(theirs.read_bytes())
        read = Ledger(tmp_path, CHUNK).read(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER[:10], 7)
        assert len(read) == 0 and mine.read_bytes() == theirs.read_bytes()
        assert len(run(tmp_path, ORDER[:10])) == 10
        assert (mine.parent / aside).read_bytes() == theirs.read_bytes()
    assert "it holds results of other weights" in caplog.text


def key_of(path: Path) -> str:
    found: str = pq.read_schema(path).metadata[b"key"].decode()
    return found


def test_no_segment_is_lost_where_the_machine_fails(tmp_path: Path) -> None:
    """No more files may be opened: that says nothing about the segments."""
    whole = run(tmp_path, ORDER[:20])
    before = {p: p.read_bytes() for p in segments(tmp_path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ledger = Ledger(tmp_path, CHUNK)
    keys.cell_key(SYSTEM, Jitter(), BALL, "adaptive", 7)  # reads sources
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for look in (ledger.read, ledger.run):
            with pytest.raises(OSError) as told:
                look(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER[:20], 7)
            assert told.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {p: p.read_bytes() for p in segments(tmp_path)} == before and same(run(tmp_path, ORDER[:20]), whole)


@pytest.mark.parametrize("error", [pa.ArrowMemoryError("full"), OSError(errno.EIO, "bad disk"), MemoryError()])
def test_what_the_machine_says_is_not_about_the_content(error: Exception) -> None:
    assert not store.about_content(error)
    assert store.about_content(pa.ArrowInvalid("no footer")) and store.about_content(OSError("Corrupt data"))


def test_no_flipped_byte_changes_a_row_unseen(tmp_path: Path) -> None:
    cell = run(tmp_path, ORDER[:10], keep=10)
    path = cell.kept[0]
    content, images_before = path.read_bytes(), cell.x_adv()
    seen = 0
    for at in range(0, len(content), 53):
        path.write_bytes(flipped(content, at))
        try:
            rows, _ = store.read(path, cell.key)
            pictures = store.read_images(path)
        except (OSError, ValueError, KeyError):
            seen += 1
            continue
        found = np.argsort(rows["index"])
        assert all(np.array_equal(rows[k][found], cell.rows[k]) for k in cell.rows)
        assert all(np.array_equal(pictures[i], images_before[i]) for i in images_before)
    assert seen > 10


def test_old_temporary_files_are_cleared(tmp_path: Path) -> None:
    run(tmp_path, ORDER[:10])
    folder = segments(tmp_path)[0].parent
    old, new = folder / ".x.1.tmp", folder / ".x.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    for path in segments(tmp_path):
        path.unlink()
    run(tmp_path, ORDER[:10])
    assert not old.exists() and new.exists()


# --- processes ----------------------------------------------------------------------------------------------


def slow_run(root: Path, indices: list[int]) -> None:
    torch.set_num_threads(1)
    Jitter.pause = 0.1
    run(root, indices)


def start(root: Path, indices: list[int]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=slow_run, args=(root, indices))
    process.start()
    return process


def attacked(root: Path) -> int:
    return sum("Jitter" in str(pq.read_schema(p).metadata[b"key"]) for p in segments(root))


def test_kill_minus_nine_loses_at_most_a_chunk(tmp_path: Path) -> None:
    process = start(tmp_path / "killed", ORDER)
    deadline = time.monotonic() + 30
    while attacked(tmp_path / "killed") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = attacked(tmp_path / "killed")
    assert process.exitcode == -signal.SIGKILL and 2 <= done < 6
    resumed = run(tmp_path / "killed")
    assert len(Jitter.chunks) == 6 - done
    assert same(resumed, run(tmp_path / "whole"))


def test_two_processes_fill_one_ledger(tmp_path: Path) -> None:
    both = [start(tmp_path / "shared", ORDER), start(tmp_path / "shared", ORDER[30:] + ORDER[:30])]
    for process in both:
        process.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    shared = run(tmp_path / "shared")
    assert not Jitter.chunks
    assert same(shared, run(tmp_path / "alone"))
    assert not list((tmp_path / "shared").rglob("*.tmp"))


def test_shards_share_the_chunks_and_make_the_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "shards", CHUNK)
    for number, done in ((1, 2), (2, 4), (3, 6)):
        cell = ledger.run(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER, 7, shard=Shard(number, 3))
        assert len(Jitter.chunks) == done and len(cell) == done * CHUNK and cell.complete == (number == 3)
    assert same(ledger.run(SYSTEM, DATA, Jitter(), BALL, "adaptive", ORDER, 7), run(tmp_path / "alone"))
    assert len(Jitter.chunks) == 12  # nothing was done twice


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_said(text: str) -> None:
    assert Shard.parse("2/4") == Shard(2, 4)
    with pytest.raises(UserError, match="a shard is written NUMBER/OF, such as 2/4"):
        Shard.parse(text)


# --- keys ---------------------------------------------------------------------------------------------------


def key(**changes: object) -> str:
    given = {"system": SYSTEM, "attack": Jitter(), "threat": BALL, "view": "adaptive", "seed": 7, **changes}
    return keys.digest(keys.cell_key(*given.values()))  # type: ignore[arg-type]


def test_everything_that_decides_is_in_the_key() -> None:
    base = key()
    assert key(attack=Jitter()) == base and key(system=linear()) == base
    others = [
        key(attack=Jitter(flavour=1)), key(attack=Identity()), key(seed=8), key(view="static"),
        key(threat=ThreatModel("linf", 0.2)), key(threat=ThreatModel("l2", 0.1)), key(system=linear(seed=1)),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


def test_images_are_in_the_key() -> None:
    other = images(SYSTEM)
    other.images.images[ORDER[0], 0, 0, 0] ^= 1
    relabelled = images(SYSTEM, wrong=60)
    prints = {d.fingerprint(ORDER[:10]) for d in (DATA, other, relabelled)} | {DATA.fingerprint(ORDER[10:20])}
    assert len(prints) == 4


ATTACK = '''
from typing import ClassVar
from casemate.attacks.base import Attack
from casemate.fields import spec

@spec
class Mine(Attack):
    """Doc."""
    needs: ClassVar = frozenset({"labels"})

    def run(self, view, x, goal, threat, seed, cost):
        return threat.project(x + threat.radius, x)
'''


def code_key(tmp_path: Path, source: str, stamp: int) -> str:
    path = tmp_path / "own_attack.py"
    path.write_text(source)
    os.utime(path, (stamp, stamp))
    sys.modules.pop("own_attack", None)
    importlib.invalidate_caches()
    return key(attack=importlib.import_module("own_attack").Mine())


def test_a_comment_keeps_the_key_and_code_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    base = code_key(tmp_path, ATTACK, 1)
    assert code_key(tmp_path, ATTACK.replace('"""Doc."""', '"""Other."""  # why'), 2) == base
    assert code_key(tmp_path, ATTACK.replace("x + threat", "x - threat"), 3) != base
    assert code_key(tmp_path, ATTACK, 4) == base


def test_the_engine_and_the_network_are_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from casemate.attacks.gradient import PGD
    from casemate.attacks.iwda import IWDA
    from casemate.attacks.transfer import Transfer

    def changed(part: str, attack: object) -> bool:
        before = key(attack=attack)
        plain = keys._hash.__wrapped__
        monkeypatch.setattr(keys, "_hash", lambda p, m: plain(p, m) + ("*" if p.stem == part else ""))
        after = key(attack=attack)
        monkeypatch.undo()
        return before != after

    assert changed("engine", PGD()) and changed("objectives", PGD()) and changed("threat", Jitter())
    assert changed("system", Jitter())
    assert not changed("engine", Jitter()) and not changed("registry", PGD()) and not changed("errors", PGD())
    assert not changed("learned", PGD()) and not changed("transfer", PGD())
    assert changed("evaluation_toys", Jitter())
    assert changed("transfer", Transfer().with_source(linear(3)))
    assert changed("singan", IWDA()) and changed("patch_pyramid", IWDA())


def test_libraries_are_not_code_of_ours() -> None:
    assert keys.source_path("casemate.threat") is not None and keys.source_path("evaluation_toys") is not None
    assert not any(map(keys.source_path, ("torch.nn", "numpy", "pathlib", "builtins", "no_such_module")))


def test_a_transfer_is_known_by_its_source() -> None:
    from casemate.attacks.transfer import Transfer

    assert key(attack=Transfer().with_source(linear(3))) != key(attack=Transfer().with_source(linear(4)))


def test_every_system_meets_the_same_noise(tmp_path: Path) -> None:
    other = linear(seed=5)
    mine, theirs = (
        Ledger(tmp_path, CHUNK).run(s, DATA, Jitter(), BALL, "adaptive", ORDER[:10], 7, keep=10)
        for s in (SYSTEM, other)
    )
    for index, image in mine.x_adv().items():
        assert np.array_equal(image, theirs.x_adv()[index])


# --- selection ----------------------------------------------------------------------------------------------


def test_a_selection_does_not_depend_on_how_it_was_filled(tmp_path: Path) -> None:
    run(tmp_path / "b", ORDER[30:])
    cells = {name: run(tmp_path / name) for name in ("a", "b")}
    clean = Ledger(tmp_path / "a", CHUNK).clean(SYSTEM, DATA, ORDER)
    write_selection(select([({"attack": "jitter"}, cells["a"]), ({"attack": "clean"}, clean)]), tmp_path / "1")
    write_selection(select([({"attack": "clean"}, clean), ({"attack": "jitter"}, cells["b"])]), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    table = pq.read_table(tmp_path / "1")
    assert table.num_rows == 120 and table["attack"].to_pylist() == ["clean"] * 60 + ["jitter"] * 60
    assert table["index"].to_pylist() == [*range(60), *range(60)]


def test_random_corners_keep_the_first_success(tmp_path: Path) -> None:
    one, many = (
        Ledger(tmp_path, CHUNK).run(SYSTEM, DATA, RandomCorners(tries=t), BALL, "adaptive", ORDER, 7, keep=60)
        for t in (1, 20)
    )
    assert (many.rows["success"] >= one.rows["success"]).all() or many.rows["success"].sum() > one.rows[
        "success"
    ].sum()
    fell = many.rows["success"] & ~many.clean_error
    assert fell.any() and (many.rows["queries"][fell] <= 20).all()
    assert (many.rows["queries"][~many.rows["success"]] == 20).all()
    assert many.rows["linf"].max() <= 0.1 + 1e-6


def test_an_evaluation_set_hands_out_unit_range_images() -> None:
    x, y = EvaluationSet(DATA.images).take([3, 1])
    assert x.shape == (2, 1, 4, 4) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert float(x[0, 0, 2, 1]) == pytest.approx(DATA.images.images[3, 2, 1, 0] / 255)
