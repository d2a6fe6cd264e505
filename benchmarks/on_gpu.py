"""What a GPU gives in slices of minutes: `python benchmarks/on_gpu.py --budget 540 --carried FOLDER --out FOLDER`.

For a machine that can be had for minutes at a time, with little that can be carried to it and back. It measures the
card's own ceilings, then works down a list: steps per second and their share of the ceiling, short trainings of the
project's defenses on CIFAR-10, records of the time to a robust accuracy, and full AutoAttack of each result. Every
item writes one JSON file when it is done, and is begun only if it should end within the budget. Results in `--out`,
or brought along in `--done`, are not made again; scoring goes on chunk by chunk, on another machine too if the
weights (float16, in files of at most 15 MB) come along. `--carried` may hold some of CIFAR-10's six .bin files
(30.7 MB each) in any depth: they are kept in `--store`, so several carries add up while the machine is held.

    python benchmarks/on_gpu.py --list            # the items and what is done
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

NEEDED = {
    "torch": "torch", "numpy": "numpy", "pydantic": "pydantic pydantic-core annotated-types typing-inspection",
    "typing_extensions": "typing-extensions", "yaml": "pyyaml", "safetensors": "safetensors",
}  # fmt: skip
"""Module -> packages that bring it. Nothing else is imported by training and evaluation."""
PIECE = 15_000_000
SPARE = 15.0  # seconds at the end of a slice for what is written


def missing() -> str:
    """One line on what must be carried, or nothing."""
    packages = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if not packages:
        return ""
    named = " ".join(packages)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"missing here: {named}. Carry them: 'pip download --no-deps --only-binary=:all: --python-version {version} "
        f"-d wheels {named}' where there is a registry; here 'pip install --no-index --no-deps --target site "
        "wheels/*.whl' and PYTHONPATH=site"
    )


@dataclass
class Slice:
    """One command's share of the machine."""

    device: str
    out: Path
    done: list[Path]
    store: Path
    until: float
    """By the monotonic clock."""
    tiny: bool = False
    keep: bool = False
    cache: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        return self.until - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.left():6.0f} s left] {text}", flush=True)

    def find(self, name: str) -> Path | None:
        return next((f / name for f in (self.out, *self.done) if (f / name).exists()), None)

    def result(self, item: str) -> dict[str, Any] | None:
        """What an item has found, in this slice or before."""
        path = self.find(f"{item}.json")
        return None if path is None else json.loads(path.read_text())

    def finished(self, item: str) -> bool:
        found = self.result(item)
        return found is not None and found.get("complete", True)

    def write(self, item: str, content: dict[str, Any]) -> None:
        from benchmarks.steps import conditions
        from benchmarks.time_to_robustness import write

        write(self.out / f"{item}.json", {"item": item, **content, "conditions": conditions(self.device)})

    def data(self) -> tuple[Any, Any, bool]:
        """(training images, test images, whether that is all of CIFAR-10) on the device."""
        if "data" not in self.cache:
            from benchmarks.carried import RECORDS, load
            from casemate.data.device import DeviceData

            train, test, whole = load(self.store, 60 if self.tiny else RECORDS)
            self.cache["data"] = (
                DeviceData(train, self.device, channels_last=True),
                DeviceData(test, self.device),
                whole,
            )
        found: tuple[Any, Any, bool] = self.cache["data"]
        return found

    # --- weights that can be carried ----------------------------------------------------------------------------

    def save_weights(self, item: str, module: Any) -> None:
        """In float16 where they are matrices, in pieces; the module has the rounded values afterwards, so what is
        scored is what is stored."""
        import torch
        from safetensors.torch import save_file

        pieces: list[dict[str, Any]] = [{}]
        size = 0
        for key, value in module.state_dict().items():
            kept = value.detach().cpu().contiguous()
            kept = kept.half() if kept.dim() > 1 and kept.is_floating_point() else kept
            if size + kept.nbytes > PIECE and pieces[-1]:
                pieces.append({})
                size = 0
            pieces[-1][key] = kept
            size += kept.nbytes
        self.out.mkdir(parents=True, exist_ok=True)
        for number, piece in enumerate(pieces, 1):
            save_file(piece, self.out / f"{item}-{number}of{len(pieces)}.safetensors")
        with torch.no_grad():
            for piece in pieces:
                for key, value in piece.items():
                    module.state_dict()[key].copy_(value)

    def load_weights(self, item: str, module: Any) -> bool:
        from safetensors.torch import load_file

        for folder in (self.out, *self.done):
            paths = sorted(folder.glob(f"{item}-*of*.safetensors"))
            if paths and len(paths) == int(paths[0].stem.rsplit("of", 1)[1]):
                state = {k: v for path in paths for k, v in load_file(path).items()}
                own = module.state_dict()
                module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})
                return True
        return False

    def drop_weights(self, item: str) -> None:
        for path in [] if self.keep else self.out.glob(f"{item}-*of*.safetensors"):
            path.unlink()


@dataclass(frozen=True)
class Item:
    """One thing to find out. `seconds` says how long it should take, from what is known by then."""

    name: str
    run: Callable[[Slice], dict[str, Any]]
    seconds: Callable[[Slice], float]
    needs: tuple[str, ...] = ()
    """Items that must be done before."""
    data: bool = False


class OutOfTime(Exception):
    """The slice has ended inside an item, which has kept what it can."""


@contextmanager
def ending(slice_: Slice) -> Iterator[None]:
    """SIGTERM when the slice ends: a training saves its checkpoint and stops, everything else just stops."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(max(0.1, slice_.left()), lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    except SystemExit as stopped:
        if stopped.code != 128 + signal.SIGTERM:
            raise
        raise OutOfTime from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def work_down(items: list[Item], slice_: Slice) -> dict[str, str]:
    """Run what fits, in order; says of every item what became of it."""
    told: dict[str, str] = {}
    for item in items:
        if slice_.finished(item.name):
            told[item.name] = "done before"
            continue
        lacking = [name for name in item.needs if not slice_.finished(name)]
        if lacking:
            told[item.name] = f"waits for {', '.join(lacking)}"
            continue
        expected = item.seconds(slice_)
        if expected > slice_.left():
            told[item.name] = f"next slice: needs about {expected:.0f} s"
            continue
        slice_.say(f"{item.name}: about {expected:.0f} s")
        begun = time.monotonic()
        try:
            with ending(slice_):
                found = item.run(slice_)
        except OutOfTime:
            told[item.name] = "cut off by the end of the slice"
            break
        except Exception as error:  # one item must not take the others' time with it
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            (slice_.out / f"{item.name}.error.txt").write_text(traceback.format_exc())
            told[item.name] = f"failed: {text[:200]}"
        else:
            slice_.write(item.name, {**found, "seconds": round(time.monotonic() - begun, 1)})
            told[item.name] = "done" if found.get("complete", True) else "begun"
        slice_.say(f"{item.name}: {told[item.name]}")
    return told


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, everything included")
    parser.add_argument("--carried", type=Path, action="append", default=[], help="where .bin files may lie")
    parser.add_argument("--store", type=Path, default=Path("/tmp/casemate-cifar10"), help="kept between commands")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--done", type=Path, action="append", default=[], help="results of earlier slices")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", help="items, or beginnings of their names")
    parser.add_argument("--keep", action="store_true", help="keep weights that are scored")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small networks, batches of 60 images")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if missing():
        print(f"error: {missing()}", file=sys.stderr)
        return 2
    from benchmarks.carried import RECORDS, collect
    from benchmarks.gpu_items import items
    from casemate.errors import UserError

    slice_ = Slice(
        options.device, options.out, options.done, options.store, began + options.budget - SPARE * (not options.tiny),
        options.tiny, options.keep,
    )  # fmt: skip
    wanted = [i for i in items(slice_) if not options.only or any(i.name.startswith(name) for name in options.only)]
    if options.list:
        for item in wanted:
            print(f"{item.name:<28}{'done' if slice_.finished(item.name) else ''}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no GPU here; --device cpu --tiny rehearses")
        found = collect(options.carried, options.store, 60 if options.tiny else RECORDS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    slice_.say(f"data: {', '.join(found) or 'none'}")
    ready = "test_batch.bin" in found and len(found) > 1
    told = work_down([item for item in wanted if ready or not item.data], slice_)
    told |= {item.name: "needs data" for item in wanted if item.data and not ready and item.name not in told}
    for name, what in told.items():
        print(f"{name:<28}{what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
