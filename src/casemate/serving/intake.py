"""Reading request bodies: none larger, slower, or in all more than the limits allow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from casemate.serving.limits import Limits, Refusal


class Intake:
    """Counts the bytes of all bodies that are being read or answered."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    @asynccontextmanager
    async def body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """The whole body, of at most `most` bytes, counted while the context is open. Raises Refusal."""
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refusal(415, "media_type", "a compressed body; send it as it is")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared[:18]) > most:
            raise self._too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._limits.body):
                    async for part in request.stream():
                        size += len(part)
                        self._held += len(part)
                        if size > most:
                            raise self._too_large(most)
                        if self._held > self._limits.held:
                            raise Refusal(429, "busy", "too many large requests at once; try again in a second")
                        parts.append(part)
            except TimeoutError:
                raise Refusal(408, "slow", f"the body was not complete after {self._limits.body:g} s") from None
            yield b"".join(parts)
        finally:
            self._held -= size

    def _too_large(self, most: int) -> Refusal:
        return Refusal(413, "body", f"the body is larger than the {most:,} bytes that this route takes")
