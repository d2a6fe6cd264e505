"""Dynamic batching: requests that wait for the model at the same time are answered by one run of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from casemate.serving.limits import Limits, Refusal

Run = Callable[[np.ndarray, Sequence[str]], dict[str, np.ndarray]]
"""(images, names of outputs) -> those outputs, a row for each image."""


@dataclass(frozen=True, eq=False)
class _Job:
    images: np.ndarray
    outputs: tuple[str, ...]
    answer: asyncio.Future[dict[str, np.ndarray]]


class Batcher:
    """An idle model starts at once; while it is busy, what arrives gathers into the next batch.

    A batch waits `limits.wait` for company only where the one before it had some: a single client never waits.
    """

    def __init__(self, run: Run, limits: Limits, observe: Callable[[int], None] = lambda images: None) -> None:
        """observe: told the number of images of each batch."""
        self._run, self._limits, self._observe = run, limits, observe
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Images in the queue."""

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def answer(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs for one request's images. Raises Refusal if the queue is full or the answer takes too long."""
        if self.waiting + len(images) > self._limits.queue:
            raise Refusal(429, "busy", f"{self.waiting} images are waiting for the model; try again in a second")
        job = _Job(images, tuple(outputs), asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(images)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._limits.answer):
                return await job.answer
        except TimeoutError:
            raise Refusal(503, "busy", f"not answered within {self._limits.answer:g} s; try again later") from None

    async def _serve(self) -> None:
        company = False
        while True:
            await self._arrived.wait()
            if company and self.waiting < self._limits.batch:
                await asyncio.sleep(self._limits.wait)
            jobs = self._take()
            company = len(jobs) > 1
            if jobs:
                await self._answer(jobs)

    def _take(self) -> list[_Job]:
        """Jobs for one batch, in order of arrival; those whose client has gone are dropped."""
        jobs: list[_Job] = []
        images = 0
        while self._jobs and (not jobs or images + len(self._jobs[0].images) <= self._limits.batch):
            job = self._jobs.popleft()
            self.waiting -= len(job.images)
            if not job.answer.done():
                jobs.append(job)
                images += len(job.images)
        if not self._jobs:
            self._arrived.clear()
        return jobs

    async def _answer(self, jobs: list[_Job]) -> None:
        names = sorted({name for job in jobs for name in job.outputs})
        try:
            images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
            found = await self._in_parts(images, names)
        except Exception as error:  # whatever the runtime raises belongs to the requests, not to this task
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        at = 0
        for job in jobs:
            rows = slice(at, at + len(job.images))
            at = rows.stop
            if not job.answer.done():
                job.answer.set_result({name: found[name][rows] for name in job.outputs})

    async def _in_parts(self, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs for any number of images, `limits.batch` at once: a single request may have more."""
        loop, size, parts = asyncio.get_running_loop(), self._limits.batch, []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            self._observe(len(part))
            parts.append(await loop.run_in_executor(self._thread, self._run, part, names))
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in names}
