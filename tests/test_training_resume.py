"""Killed anywhere, a run ends with the bits of an uninterrupted one; what is damaged is seen and said."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry_toys
import torch
from training_toys import Noisy, Plain, batch_norm_net, data, recipe, run, same, weights

from casemate import registry
from casemate.errors import UserError
from casemate.fields import spec
from casemate.trainable import Context
from casemate.training.checkpoint import Checkpoints, identity_hash
from casemate.training.recorder import ListRecorder

HERE = Path(__file__).resolve().parent
EVERYTHING = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "schedule": "cosine", "warmup": 0.2},
    "adam": {"optimizer": "adam", "lr": 0.01, "ema": 0.9, "select": "best"},
}
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from casemate.training import loop
from test_training_resume import train_everything
loop.SAVE_SECONDS = 0.0  # after every batch
train_everything(sys.argv[1], checkpoints=Path(sys.argv[2]))
"""


def train_everything(kind: str, **changes: Any) -> Any:
    """A run with batch norm, dropout, draws, state, logs, validation, or one of several players; 14 batches."""
    if kind == "players":
        at = os.environ.get("TOY_DIES_AT")
        method = registry_toys.many_players()
        dying = registry_toys.mortal(method, int(at or -1), lambda: os.kill(os.getpid(), signal.SIGKILL))
        made = recipe(epochs=3.5, batch_size=6, momentum=0.9, schedule="cosine")
        return registry_toys.run(dying, made, identity={"data": "toy"}, **changes)
    made = recipe(epochs=3.5, **EVERYTHING[kind])
    return run(Noisy(), made, network=batch_norm_net, val_data=data(30, seed=1), identity={"data": "toy"}, **changes)


def killed_at(step: int, kind: str, folder: Path) -> None:
    """Train in a process of its own that gets SIGKILL in the middle of that step."""
    environment = {**os.environ, "TOY_DIES_AT": str(step), "OMP_NUM_THREADS": "1"}
    # this code, and not another copy that is installed
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", CHILD, kind, str(folder)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["sgd", "adam", "players"])
def test_kill_9_at_any_step_then_resume_is_bit_identical(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_everything(kind)
    assert straight.steps == 14
    step = random.randint(1, 13)  # another one each time
    killed_at(step, kind, tmp_path)
    recorder = ListRecorder()
    resumed = train_everything(kind, checkpoints=tmp_path, recorder=recorder)
    assert f"resumed after step {step} of 14" in capsys.readouterr().err
    assert all(same(weights(resumed, part), weights(straight, part)) for part in straight.modules)
    assert resumed.curves == straight.curves and resumed.chosen_epoch == straight.chosen_epoch
    assert [row for _, row in recorder.rows()] == straight.curves, "the recorder has the earlier epochs, too"
    assert not list(tmp_path.iterdir()), "removed on success"


def half_done(folder: Path, **changes: Any) -> Path:
    """Both slots of a run that died after its last epoch, before its result was saved; returns their folder."""

    class Died(Exception):
        pass

    def die(trained: object) -> None:
        raise Died

    arguments = {"made": recipe(epochs=3), **changes}
    with pytest.raises(Died):
        run(arguments.pop("method", Plain()), arguments.pop("made"), checkpoints=folder, save=die, **arguments)
    (found,) = folder.iterdir()
    return found


def test_the_best_epoch_so_far_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    best: dict[str, Any] = {"made": recipe(epochs=4, lr=2.0, select="best"), "val_data": data(30, seed=1)}
    half_done(tmp_path, **best)
    made = best.pop("made")
    straight, resumed = run(Plain(), made, **best), run(Plain(), made, checkpoints=tmp_path, **best)
    assert straight.chosen_epoch < 4, "the last epoch is not the best"
    assert resumed.chosen_epoch == straight.chosen_epoch
    assert same(weights(resumed), weights(straight))


def test_a_finished_run_is_kept_until_its_result_is_saved(tmp_path: Path) -> None:
    half_done(tmp_path)
    saved: list[Any] = []
    again = run(Plain(), recipe(epochs=3), checkpoints=tmp_path, save=saved.append)
    assert saved == [again] and again.steps == 12
    assert same(weights(again), weights(run(Plain(), recipe(epochs=3))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "json", "json body"])
def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = half_done(tmp_path)
    newest = max(folder.glob("*.json"), key=lambda path: json.loads(path.read_text())["serial"])
    tensors = newest.with_suffix(".safetensors")
    if damage == "flip a bit":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "json":
        newest.write_text("{")
    else:
        newest.write_text(newest.read_text().replace('"stop": false', '"stop": true'))
    resumed = run(Plain(), recipe(epochs=3), checkpoints=tmp_path)
    said = capsys.readouterr().err
    assert f"{folder / newest.stem} is corrupt" in said and "resumed after step 8 of 12" in said
    assert same(weights(resumed), weights(run(Plain(), recipe(epochs=3))))


def test_two_corrupt_checkpoints_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = half_done(tmp_path)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    resumed = run(Plain(), recipe(epochs=3), checkpoints=tmp_path)
    said = capsys.readouterr().err
    assert said.count("is corrupt") == 2 and "resumed" not in said
    assert same(weights(resumed), weights(run(Plain(), recipe(epochs=3))))


def test_a_slot_that_was_being_written_is_no_checkpoint_and_no_complaint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = half_done(tmp_path)
    newest = max(folder.glob("*.json"), key=lambda path: json.loads(path.read_text())["serial"])
    newest.unlink()
    (folder / ".a.safetensors.tmp").write_bytes(b"half")
    run(Plain(), recipe(epochs=3), checkpoints=tmp_path)
    said = capsys.readouterr().err
    assert "corrupt" not in said and "resumed after step 8 of 12" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"made": recipe(epochs=3, lr=0.2)}, {"made": recipe(epochs=4)}, {"identity": {"data": "other"}}, {"seed": 1}],
)
def test_a_changed_identity_does_not_resume(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path, identity={"data": "toy"})
    arguments = {"made": recipe(epochs=3), "identity": {"data": "toy"}, **change}
    run(Plain(), arguments.pop("made"), checkpoints=tmp_path, **arguments)
    assert "resumed" not in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1, "the other run's checkpoints stay"


def test_the_order_of_keys_is_no_change() -> None:
    assert identity_hash({"a": 1, "b": (2, 3)}) == identity_hash({"b": [2, 3], "a": 1})
    assert identity_hash({"a": 1}) != identity_hash({"a": 2})


def test_one_run_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, {"run": 1})
    code = (
        "import sys, time; from pathlib import Path; from casemate.training.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]), {'run': 1}).locked():\n    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {other.pid} is training exactly this"), store.locked():
            pass
        with Checkpoints(tmp_path, {"run": 2}).locked():
            pass
        other.kill()
    with store.locked():
        store.remove()


@pytest.mark.parametrize(("size", "note", "named"), [(100_000, "", "a.safetensors"), (1, "x" * 20_000, "a.json")])
def test_a_full_disk_names_the_file_and_leaves_the_last_checkpoint(
    size: int, note: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Checkpoints(tmp_path, {})
    with store.locked():
        for step in (1, 2):
            store.save({"t": torch.full((10,), float(step))}, {"step": step})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                store.save({"t": torch.zeros(size)}, {"step": 3, "note": note})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert Path(caught.value.filename).name == named
        found = Checkpoints(tmp_path, {}).load()
        assert found is not None and found[1] == {"step": 2} and found[0]["t"][0] == 2
        assert "corrupt" not in capsys.readouterr().err
        assert not list(store.folder.glob(".*"))


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    folder = half_done(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.json", "a.safetensors", "b.json", "b.safetensors", "lock",
    ]  # fmt: skip
    header = (folder / "a.safetensors").read_bytes()[8:40]
    assert header.startswith(b"{")


@spec
class Marking(Plain):
    """Marks its first epoch and ends after its third."""

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        ctx.keep, ctx.stop = ctx.epoch == 0, ctx.epoch == 2


def test_the_epoch_a_method_kept_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    half_done(tmp_path, method=Marking(), made=recipe(epochs=5))
    resumed = run(Marking(), recipe(epochs=5), checkpoints=tmp_path)
    assert (resumed.steps, resumed.chosen_epoch) == (12, 1)
    assert same(weights(resumed), weights(run(Plain(), recipe(epochs=1))))


@pytest.mark.parametrize("name", [name for name in registry.names("defense") if name != "given"])
def test_every_defense_goes_on_from_the_middle_of_a_step_with_the_bits_of_an_unbroken_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken off after the first update of its fifth step, then resumed: all modules and curves are the same."""
    method, made = registry_toys.toy(name), recipe(epochs=3, batch_size=8, momentum=0.9, schedule="cosine")
    straight = registry_toys.run(method, made)
    mortal = registry_toys.mortal(method, 4)
    with pytest.raises(registry_toys.Died), pytest.MonkeyPatch.context() as patch:
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        registry_toys.run(mortal, made, checkpoints=tmp_path)
    resumed = registry_toys.run(mortal, made, checkpoints=tmp_path)
    assert "resumed after step" in capsys.readouterr().err
    assert resumed.modules.keys() == straight.modules.keys()
    assert all(same(weights(resumed, part), weights(straight, part)) for part in straight.modules)
    assert resumed.curves == straight.curves and resumed.steps == straight.steps
