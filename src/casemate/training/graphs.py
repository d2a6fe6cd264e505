"""A whole training step, attack and updates, as one CUDA graph: the host launches once what else is thousands of
kernels, and waits for nothing.

A graph repeats what was done when it was captured, on the same memory. So everything that changes from step to step
must reach it through tensors: the batch, the learning rates, the method's state, and the random draws, which are made
as ever and copied in before each replay. What Python decided must still hold: the loop asks that of the `Moment` that
the method has read. Steps for which this cannot be had run as they are, which is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from casemate.errors import first_line
from casemate.trainable import Context, Moment
from casemate.training.updates import Updates

WARM, MOST = 3, 6
"""Equal steps before one is captured: optimizers and convolution algorithms must have settled. Graphs kept."""
FACTORIES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm})

Body = Callable[[Tensor, Tensor], None]


class Backend(Protocol):
    """How work is captured: `Cuda` here; a tape that repeats it on the CPU in tests."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` does, without its taking effect; the result does it."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Where steps run before one like them is captured."""
        ...


class Cuda:
    """Captures on a stream of its own, on which the steps before have run: nothing that autograd remembers of them
    then ties the capture to work outside it."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        return graph.replay

    @contextmanager
    def aside(self) -> Iterator[None]:
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)


BACKENDS: dict[str, Callable[[], Backend]] = {"cuda": Cuda}
"""By type of device."""


class Ordinal(int):
    """A step or epoch number that remembers whether it was used: a repeated step could not know it."""

    def __init__(self, value: int) -> None:
        self.loose = False


def _used(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(number: Ordinal, *others: Any) -> Any:
        number.loose = True
        return plain(number, *others)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne", "hash"):
    setattr(Ordinal, f"__{_name}__", _used(f"__{_name}__"))
for _name in ("radd", "rsub", "rmul", "bool", "int", "index", "float", "str", "repr", "format"):
    if hasattr(int, f"__{_name}__"):
        setattr(Ordinal, f"__{_name}__", _used(f"__{_name}__"))


class State(dict[str, Tensor]):
    """A method's tensors, which remembers the keys that a step has asked for: its others do not concern it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.touched: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.touched.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.touched.add(key)
        super().__setitem__(key, value)

    def update(self, *given: Any, **named: Tensor) -> None:
        for key, value in dict[str, Tensor](*given, **named).items():
            self[key] = value

    def __contains__(self, key: object) -> bool:
        self.touched.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.touched.add(key)
        return super().get(key, default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.touched.add(key)
        return super().setdefault(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.touched.add(key)
        return super().pop(key, *default)


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
Made = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor]


class Draws(TorchFunctionMode):
    """Gives every factory that is called with the step's generator to `made`, if there is one, and sees to it that no
    watched number goes into an operation unnoticed."""

    def __init__(self, rng: torch.Generator, made: Made | None = None) -> None:
        super().__init__()
        self.rng, self.made = rng, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in (*args, *kwargs.values()):
            if isinstance(given, Moment | Ordinal):
                given.loose = True
        if self.made is None or kwargs.get("generator") is not self.rng:
            return func(*args, **kwargs)
        if func not in FACTORIES:
            raise RuntimeError(f"{func.__name__} with the step's generator")
        return self.made(func, args, kwargs)


def on_device(rng: torch.Generator, device: torch.device) -> Draws:
    """Draws of the step made by the device's own generator, which the loop seeds for every step."""

    def made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        drawn: Tensor = func(*args, **{**kwargs, "generator": None, "device": device})
        return drawn

    return Draws(rng, made)


@dataclass
class Graph:
    """One captured step and the tensors through which it is fed and read."""

    replay: Callable[[], None]
    x: Tensor
    y: Tensor
    indices: Tensor
    given: dict[str, Tensor]
    """State that the step reads."""
    kept: dict[str, Tensor]
    """State that it leaves."""
    dropped: set[str]
    losses: list[tuple[tuple[str, ...], Tensor]]
    logs: dict[str, Tensor]
    draws: list[tuple[Callable[[], Tensor], Tensor]]
    moment: Moment


@dataclass
class _Warm:
    """Equal steps so far, what the last of them read of the fraction, the state it asked for, and what it drew."""

    count: int
    moment: Moment
    touched: frozenset[str]
    drawn: list[tuple[Call, Tensor]]


class StepGraphs:
    """Runs steps: as they are at first, then as graphs. `body(x, y)` is one step, without the seeding before it."""

    def __init__(
        self, body: Body, context: Context, updates: Updates, device: torch.device, note: Callable[[str], None],
        backend: Backend,
    ) -> None:  # fmt: skip
        self.body, self.context, self.updates, self.device, self.note = body, context, updates, device, note
        self.backend = backend
        self.graphs: dict[Any, list[Graph]] = {}
        self.warm: dict[Any, _Warm] = {}
        self.off = False
        self.state = context.state = State(context.state)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """One step, in the state that the context and the generators are in."""
        if self.off:
            self.body(x, y)
            return
        context = self.context
        fraction, step, epoch = context.fraction, context.step, context.epoch
        shape = (x.shape, self.updates.perturbing)
        graph = self._fitting(shape, fraction)
        if graph is None:
            moment = Moment(fraction)
            context.fraction, context.step, context.epoch = moment, Ordinal(step), Ordinal(epoch)
            watched = (moment, context.step, context.epoch)
            try:
                graph = self._new(shape, moment, fraction, x, y)
            finally:
                context.fraction, context.step, context.epoch = fraction, step, epoch
            if any(number.loose for number in watched):
                self.give_up("this method's step depends on how far training is")
        if graph is not None:
            self._run(graph, x, y)

    def give_up(self, why: str) -> None:
        """From now on every step runs as it is."""
        if not self.off:
            self.note(f"cuda_graph: steps run one kernel after the other: {why}")
        self.off, self.graphs, self.warm = True, {}, {}

    # --- capture ------------------------------------------------------------------------------------------------

    def _fitting(self, shape: Any, fraction: float) -> Graph | None:
        for (known, signature), graphs in self.graphs.items():
            if known == shape and signature == self._signature(name for name, _ in signature):
                for graph in graphs:
                    if graph.moment.holds(fraction):
                        return graph
        return None

    def _new(self, shape: Any, moment: Moment, fraction: float, x: Tensor, y: Tensor) -> Graph | None:
        """A graph, if enough steps like this one have gone before; else the step is run and counted."""
        before = self.warm.get(shape)
        equal = before is not None and before.moment.holds(fraction)
        if before is not None and equal and before.count >= WARM and sum(map(len, self.graphs.values())) < MOST:
            graph = self._captured(shape, moment, before, x, y)
            if graph is not None:
                return graph
        self.state.touched, drawn = set(), []

        def seen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            made: Tensor = func(*args, **kwargs)
            drawn.append(((func, args, kwargs), made))
            return made

        with self.backend.aside(), Draws(self.context.rng, seen):
            self.body(x, y)
        count = 1 + (before.count if before is not None and equal else 0)
        self.warm[shape] = _Warm(count, moment, frozenset(self.state.touched), drawn)
        return None

    def _captured(self, shape: Any, moment: Moment, before: _Warm, x: Tensor, y: Tensor) -> Graph | None:
        context, state, pending = self.context, self.state, self.updates.pending
        signature = self._signature(before.touched)
        given = {key: dict.__getitem__(state, key).clone() for key, kind in signature if kind is not None}
        made = Graph(
            lambda: None, x.clone(), y.clone(), context.indices.clone(), given, {}, set(), [], {}, [], moment
        )
        made.draws = [self._place(call, drawn) for call, drawn in before.drawn]
        places = iter(list(zip([call for call, _ in before.drawn], [place for _, place in made.draws], strict=True)))
        stands, indices, logs, first = dict(state), context.indices, dict(context.logs), len(pending)

        def work() -> None:
            state.touched, context.indices = set(), made.indices
            dict.update(state, given)
            with Draws(context.rng, lambda *call: _next(places, call)):
                self.body(made.x, made.y)

        try:
            made.replay = self.backend.capture(work)
            made.losses = [(players, loss) for _, players, loss in pending[first:]]
            made.logs = dict(context.logs)
            seen = state.touched | given.keys()
            made.kept = {key: value for key, value in state.items() if key in seen}
            made.dropped = seen - made.kept.keys()
        except (RuntimeError, TypeError) as error:
            self.give_up(f"it cannot be captured ({first_line(error)})")
            return None
        finally:
            del pending[first:]
            context.indices, context.logs = indices, logs
            dict.clear(state)
            dict.update(state, stands)
            self.updates.clear()
        self.graphs.setdefault((shape, signature), []).append(made)
        return made

    def _place(self, call: Call, drawn: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        """How a draw is made, on the host as it ever was, and where the graph will find it."""
        func, args, kwargs = call
        pinned = {"pin_memory": True} if self.device.type == "cuda" else {}
        place = torch.empty(drawn.shape, dtype=drawn.dtype, device=self.device)
        return lambda: func(*args, **kwargs, **pinned), place

    def _signature(self, keys: Iterable[str]) -> tuple[tuple[str, Any], ...]:
        """Which of those tensors the state has, and of what kind."""
        found = {key: dict.get(self.state, key) for key in keys}
        kinds = {k: None if t is None else (tuple(t.shape), t.dtype, t.device.type) for k, t in found.items()}
        return tuple(sorted(kinds.items()))

    # --- replay -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, graph: Graph, x: Tensor, y: Tensor) -> None:
        context, state = self.context, self.state
        graph.x.copy_(x)
        graph.y.copy_(y)
        graph.indices.copy_(context.indices)
        for key, place in graph.given.items():
            found = dict.__getitem__(state, key)
            if found is not place:
                place.copy_(found)
        for draw, place in graph.draws:
            place.copy_(draw(), non_blocking=True)
        graph.replay()
        for key, value in graph.kept.items():
            dict.__setitem__(state, key, value)
        for key in graph.dropped:
            dict.pop(state, key, None)
        self.updates.pending += [(context.step, players, loss.clone()) for players, loss in graph.losses]
        context.logs.update(graph.logs)


def _next(places: Iterator[tuple[Call, Tensor]], call: Call) -> Tensor:
    """The place of the next draw of a step, which must be that of the steps before."""
    known, place = next(places, (None, None))
    if known is None or place is None or known[0] is not call[0] or known[1] != call[1]:
        raise RuntimeError("it does not draw the same in every step")
    return place
