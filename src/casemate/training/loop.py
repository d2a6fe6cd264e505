"""The training loop. It runs any `Trainable`, and knows no method by name."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casemate.defenses.folding import folding
from casemate.errors import UserError
from casemate.seeding import derive
from casemate.system import frozen
from casemate.trainable import Context, Task, Trainable
from casemate.training import memory, precision
from casemate.training.averages import WeightAverage
from casemate.training.awp import WeightPerturbation
from casemate.training.checkpoint import Checkpoints
from casemate.training.compiled import compiled, first_lines, in_backward
from casemate.training.graphs import BACKENDS, StepGraphs, on_device
from casemate.training.inputs import Draw, TrainingData
from casemate.training.progress import display
from casemate.training.recipe import Recipe
from casemate.training.recorder import NullRecorder, Recorder
from casemate.training.rehearsal import rehearse, seed_torch
from casemate.training.signals import Interruption
from casemate.training.snapshot import copy_into
from casemate.training.state import RunState, Watchful
from casemate.training.updates import NotFinite, Updates
from casemate.training.validation import CHUNK, can_validate, validate

CHECK_STEPS, CHECK_SECONDS = 50, 2.0  # how often the loop waits for the device
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Trained:
    """What `train` made."""

    modules: dict[str, nn.Module]
    """In eval mode; the moving average of the weights if the recipe keeps one, of the chosen epoch."""
    curves: list[dict[str, float]]
    """One row per pass over the data: epoch (passes so far), losses and logs, lr, val_clean and val_robust."""
    epochs: float
    """Effective passes over the training set, replays counted."""
    steps: int
    chosen_epoch: float
    """The `epoch` of the row whose weights these are, or where between two rows a method had them kept."""
    precision: precision.Chosen


def train(
    method: Trainable,
    task: Task,
    train_data: TrainingData,
    val_data: TrainingData | None,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str,
    checkpoints: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    recorder: Recorder | None = None,
    progress: bool = False,
    pad: int = 0,
    flip: bool = False,
    save: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train a method for the recipe's budget and return the result.

    Args:
        method: a defense, or an attack that learns (then `task.victim` is frozen for as long as this runs).
        task: its `player` should be `recipe.player`; `seed` and `steps` are filled in here.
        train_data, val_data: on `device`. Without validation data (or for an attack) nothing is validated.
        checkpoints: folder for checkpoints, keyed by everything that decides the result: recipe, seed, method and
            `identity` (JSON-able: data checksum, network, code). A run found there is resumed; on the CPU the result
            is bit-identical to an uninterrupted one. Removed on success, after `save` has returned.
        recorder: gets one row of metrics per epoch; a resumed run repeats the earlier rows.
        progress: show progress on stderr.
        pad, flip: the data set's augmentation, used if `recipe.augment`.
        save: called with the result while the checkpoints still exist.

    Raises UserError if the loss or a weight stops being finite, or if the same run is under way elsewhere.
    """
    device = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        if task.victim is not None:
            stack.enter_context(frozen(task.victim))
        if task.victim_system is not None:
            stack.enter_context(task.victim_system.frozen())
        augment = (pad, flip) if recipe.augment else (0, False)
        run = _Run(method, task, train_data, val_data, recipe, seed, device, augment, recorder or NullRecorder())
        store = None if checkpoints is None else Checkpoints(checkpoints, run.identity(identity or {}))
        if store is not None:
            stack.enter_context(store.locked())
        with Interruption() as interruption:
            trained = run.to_the_end(store, interruption, progress)
        if save is not None:
            save(trained)
        if store is not None:
            store.remove()
    return trained


class _Run(RunState):
    """One training run: its state, and the steps that change it."""

    def __init__(
        self, method: Trainable, task: Task, data: TrainingData, val_data: TrainingData | None, recipe: Recipe,
        seed: int, device: torch.device, augment: tuple[int, bool], recorder: Recorder,
    ) -> None:  # fmt: skip
        self.method, self.data, self.recipe, self.seed = method, data, recipe, seed
        self.recorder, (self.pad, self.flip) = recorder, augment
        self.replays = method.updates_per_batch
        self.per_epoch = recipe.batches(len(data))
        if self.per_epoch == 0:
            raise UserError(f"batch_size {recipe.batch_size} is more than the {len(data)} training images")
        self.total = max(1, round(recipe.epochs * self.per_epoch / self.replays))
        self.steps = self.total * self.replays
        self.task = replace(task, seed=seed, steps=self.steps)
        self.val_data = val_data if val_data is not None and can_validate(method) else None
        if recipe.select == "best" and self.val_data is None:
            raise UserError("recipe select: best needs a validation split and a defense; use select: last")

        seed_torch(device, seed, "modules")
        modules = method.modules(self.task)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        for module in modules.values():
            module.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.layout = layout
        sized = [modules["classifier"]] if "classifier" in modules else list(modules.values())
        self.precision = precision.choose(recipe.precision, device, sized)
        players = method.players(self.task, modules)
        perturbation = WeightPerturbation(modules, recipe) if recipe.awp else None
        updates = Updates(players, self.precision, device, perturbation)
        average = None
        if recipe.ema:
            copied = round(recipe.ema_warmup * self.steps)
            average = WeightAverage(modules, recipe.ema, warmup=copied, statistics=recipe.ema_statistics)
        self.rng = torch.Generator()
        self.draw = Draw(data, self.rng, pad=self.pad, flip=self.flip)
        context = Context(
            modules, task.threat, rng=self.rng, draw=self.draw, victim=task.victim,
            autocast=lambda: precision.autocast(self.precision, device),
        )  # fmt: skip
        super().__init__(modules, updates, average, context, device)
        self.advance: Callable[[Tensor, Tensor], None] = self._body
        self.at_hand: tuple[Tensor, Tensor, Tensor] | None = None
        self._parts = [part for module in modules.values() for part in module.modules()]

    def identity(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the result, JSON-able."""
        kind = type(self.method)
        options: dict[str, Any] = asdict(self.method) if is_dataclass(self.method) else {}
        return {
            "given": dict(given),
            "method": [kind.__module__, kind.__qualname__, options],
            "recipe": self.recipe.as_dict(),
            "threat": [self.task.threat.norm, self.task.threat.radius],
            "run": [self.seed, len(self.data), self.steps, self.precision, self.pad, self.flip],
        }

    # --- the run ------------------------------------------------------------------------------------------------

    def to_the_end(self, store: Checkpoints | None, interruption: Interruption, progress: bool) -> Trained:
        self.store, self.interruption = store, interruption
        found = store.load() if store is not None else None
        if store is not None and found is not None:
            self.restore(*found, f"checkpoint {store.folder}")
        self.display = display(progress, self.steps, self.steps / self.per_epoch, self.step)
        self.context.note = self.display.note
        try:
            if self.step:
                self.display.note(f"resumed after step {self.step} of {self.steps}")
            for number, row in enumerate(self.curves, 1):
                self.recorder.metrics(row, step=number)
            self.checked = self.saved = time.monotonic()
            with self._as_fast_as_asked():
                while self.epoch * self.per_epoch < self.total and not self.context.stop:
                    self._epoch()
            return self._trained()
        except NotFinite as error:
            raise UserError(self._explain(error)) from None
        except torch.AcceleratorError as error:
            raise UserError(f"the device failed at step {self.step} ({first_lines(error)}){self._kept()}") from error
        except (RuntimeError, MemoryError) as error:
            if memory.out_of_memory(error):
                raise UserError(self._too_large()) from None
            if not isinstance(error, RuntimeError) or not (self.recipe.compile and in_backward(error)):
                raise
            raise UserError(f"this method cannot be compiled: set compile: false ({first_lines(error)})") from error
        finally:
            self.display.close()

    @contextmanager
    def _as_fast_as_asked(self) -> Iterator[None]:
        """The recipe's ways to run the same step faster."""
        recipe, note = self.recipe, self.display.note
        with ExitStack() as stack:
            if recipe.compile:
                stack.enter_context(compiled(self.modules, note))
            if recipe.fold_norms:
                stack.enter_context(folding(note))
            if recipe.cuda_graph:
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                self._capture(note)
            yield

    def _capture(self, note: Callable[[str], None]) -> None:
        """Steps as graphs, if this device and this method can."""
        backend = BACKENDS.get(self.device.type)
        if backend is None or not self.method.capturable:
            why = "there is no GPU here" if backend is None else "what it does next depends on values on the device"
            note(f"cuda_graph: steps run one kernel after the other: {why}")
            return
        self.updates.capturable()
        torch.backends.cudnn.benchmark = True  # shapes do not change, and the first steps are not captured
        self.advance = StepGraphs(self._body, self.context, self.updates, self.device, note, backend())

    def _epoch(self) -> None:
        end = min(self.per_epoch, self.total - self.epoch * self.per_epoch)
        batches = self.data.batches(
            self.recipe.batch_size, seed=self.seed, epoch=self.epoch, pad=self.pad, flip=self.flip,
            drop_last=self.recipe.drop_last, start=self.batch,
        )  # fmt: skip
        for x, y, indices in itertools.islice(batches, end - self.batch):
            x = x.contiguous(memory_format=self.layout)
            self.at_hand = x, y, indices
            for _ in range(self.replays):
                self._step(x, y, indices)
            self.batch += 1
            if self.batch < end:
                self._look(epoch_over=False)
                self.keep({"epoch": self.step / self.per_epoch}, best=self.recipe.select == "best")
                if self.context.stop:
                    break
            self._between_batches()
        self._close_epoch(last=(self.epoch + 1) * self.per_epoch >= self.total)

    def _step(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        self.rng.manual_seed(derive(self.seed, "step", self.step))
        seed_torch(self.device, self.seed, "step", self.step)
        context = self.context
        context.step, context.epoch, context.indices = self.step, self.epoch, indices
        context.fraction = self.step / self.steps
        if not all(part.training for part in self._parts):
            for module in self.modules.values():
                module.train()
        self.updates.begin((self.step + 0.5) / self.steps)  # the middle: no first step at a rate of 0
        context.perturbed = self.updates.perturbing
        self.advance(x, y)
        self.step += 1
        self.logs.add(context.logs)
        if self.average is not None:
            self.average.update(self.step)

    def _look(self, *, epoch_over: bool) -> bool:
        """Let a method look at what it trains; whether that was then put back to what was held."""
        if not isinstance(self.method, Watchful):
            return False
        with self.draw.plain():
            wish = self.method.look(self.context, self.updates.factor(), epoch_over=epoch_over)
        self.logs.add(self.context.logs)
        if wish == "hold":
            self.hold()
        elif wish == "go back":
            self.go_back()
        return wish == "go back"

    def settle(self) -> None:
        """Give averaged weights the running statistics that fit them, by steps in which nobody learns."""

        def shown(modules: dict[str, nn.Module]) -> None:
            rehearse(
                modules, self.method, self.context, self.updates, self.data, self.recipe,
                seed=derive(self.seed, "statistics", self.step), device=self.device, pad=self.pad, flip=self.flip,
            )  # fmt: skip

        if self.average is not None:
            self.average.settle(shown)

    def _body(self, x: Tensor, y: Tensor) -> None:
        """The method's step and its updates: all that a CUDA graph repeats."""
        with on_device(self.rng, self.device) if self.recipe.noise == "device" else nullcontext():
            for update in self.method.step(self.context, x, y):
                self.updates.apply(update, self.step)

    def _between_batches(self) -> None:
        now = time.monotonic()
        if self.step % CHECK_STEPS < self.replays or now - self.checked > CHECK_SECONDS:
            self.display.update(self.step, self._check())
        if self.interruption.requested is not None:
            self._interrupted()
        if now - self.saved > SAVE_SECONDS:
            self._save()

    def _close_epoch(self, *, last: bool) -> None:
        self._check()
        self.require_finite()
        measured: dict[str, float] = {}
        begun = False  # from then on what a method has found is in its state: to find it twice is another run

        def measure() -> dict[str, float]:
            if not measured and self.val_data is not None:
                measured.update(self._validate(self.val_data, stoppable=not begun))
            return dict(measured)

        every = self.recipe.validate_every
        due = last or (every and (self.epoch + 1) % every == 0)
        if due:
            measure()
        begun = True
        self.rng.manual_seed(derive(self.seed, "epoch_end", self.epoch))
        seed_torch(self.device, self.seed, "epoch_end", self.epoch)
        if self._look(epoch_over=True):
            measured.clear()
        with self.draw.plain():
            self.method.epoch_end(self.context, measure)
        if due or self.context.stop:
            measure()
        if last or self.context.stop:
            self.settle()
        self.logs.add(self.context.logs)
        row = {"epoch": self.step / self.per_epoch, **self.updates.means(), **self.logs.means()}
        row |= {"lr": self.updates.lr(), **measured}
        self.updates.reset()
        self.logs.reset()
        self.curves.append(row)
        self.keep(row, best=self.recipe.select == "best")
        self.epoch, self.batch = self.epoch + 1, 0
        self.recorder.metrics(row, step=self.epoch)
        self.display.epoch(self.step, row)
        self._save()

    def _validate(self, data: TrainingData, *, stoppable: bool) -> dict[str, float]:
        self.settle()
        weights = self.result

        def work() -> dict[str, float]:
            return validate(
                self.method, self.task, weights, data, seed=self.seed, device=self.device,
                between=lambda: self._interrupted() if stoppable and self.interruption.requested else None,
            )  # fmt: skip

        return memory.in_pieces(work, weights.get("classifier"), CHUNK, self.display.note)

    def _trained(self) -> Trained:
        self.updates.clear()
        modules = self.result
        earlier = bool(self.best) and (self.recipe.select == "best" or self.context.stop)
        if earlier:
            copy_into(modules, self.best, "an earlier epoch")
        for module in modules.values():
            module.eval()
        done = self.step / self.per_epoch
        return Trained(modules, self.curves, done, self.step, self.best_epoch if earlier else done, self.precision)

    # --- checkpoints, mistakes ------------------------------------------------------------------------------------

    def _check(self) -> float | None:
        """Wait for the device; the mean loss since the last time. Raises NotFinite."""
        self.checked = time.monotonic()
        return self.updates.check()

    def _save(self) -> None:
        if self.store is None:
            return
        self._check()
        self.require_finite()
        self.store.save(*self.packed())
        self.saved = time.monotonic()

    def _interrupted(self) -> None:
        self._save()
        kept = "nothing was kept" if self.store is None else "saved; the same command goes on from here"
        self.display.note(f"stopped after step {self.step} of {self.steps}: {kept}")
        self.interruption.stop()

    def _explain(self, error: NotFinite) -> str:
        mend = "lower lr" + (", or set precision: fp32" if self.precision == "bf16" else "")
        at = f"epoch {error.step / self.per_epoch:.4g}, step {error.step}"
        return f"training broke down at {at}: {error}; {mend}{self._kept()}"

    def _kept(self) -> str:
        if self.store is None or not self.store.exists:
            return ""
        return f"; the last good checkpoint is kept in {self.store.folder}"

    def _too_large(self) -> str:
        """What to say when memory has run out in a step: the batch that fits, found by trying. The run is over, so
        the trial may spoil it; batch statistics would change with the batch, so it is not cut behind one's back."""
        said = f"out of memory at step {self.step} with batch_size {self.recipe.batch_size}"
        if self.at_hand is None:
            return f"{said}, before a batch was at hand: take a larger device{self._kept()}"
        x, y, indices = self.at_hand
        self.advance = self._body

        def step(size: int) -> None:
            self.updates.clear()
            self.context.indices = indices[:size]
            self._body(x[:size], y[:size])

        size = memory.fitting(step, len(x) // 2)
        if size:
            return f"{said}: {size} fits (set batch_size, and lower lr with it){self._kept()}"
        return f"{said}, and no smaller batch fits: take a smaller network or a larger device{self._kept()}"
