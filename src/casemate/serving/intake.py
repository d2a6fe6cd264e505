"""Reading request bodies: none larger, slower, or in all more than the limits allow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casemate.serving.limits import Limits, Refusal


class Intake:
    """Counts the bytes of all bodies that are being read or answered, and what reading them takes besides."""

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

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """As much memory besides the bodies, counted like them while the context is open. Raises Refusal."""
        if size > self._limits.held:
            most = self._limits.held >> 20
            raise Refusal(
                413, "body", f"this much takes more than {most} MiB; use binary tensors, or fewer images at once"
            )
        if self._held + size > self._limits.held:
            raise Refusal(429, "busy", "too many large requests at once; try again in a second")
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    def _too_large(self, most: int) -> Refusal:
        return Refusal(413, "body", f"the body is larger than the {most:,} bytes that this route takes")


class Bounded:
    """Around an application that reads its bodies itself: their length must be declared, none is over `most` bytes,
    all together not over `limits.held`, and each comes within `limits.body` seconds."""

    def __init__(self, app: ASGIApp, limits: Limits, most: int) -> None:
        self.app, self._limits, self._most, self._held = app, limits, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = int(headers.get("content-length", "0")[:18])
        refusal = self._refusal(length, "transfer-encoding" in headers)
        if refusal is not None:
            await JSONResponse({"error": str(refusal)}, refusal.status)(scope, receive, send)
            return
        self._held += length
        try:
            await self.app(scope, self._patient(receive), send)
        finally:
            self._held -= length

    def _refusal(self, length: int, undeclared: bool) -> Refusal | None:
        if undeclared:
            return Refusal(411, "body", "a body whose length is not declared")
        if length > self._most:
            return Refusal(413, "body", f"the body is larger than {self._most:,} bytes")
        if self._held + length > self._limits.held:
            return Refusal(429, "busy", "too many large requests at once; try again in a second")
        return None

    def _patient(self, receive: Receive) -> Receive:
        """To a client that takes too long the application says what it says to one that has gone."""
        end, complete = asyncio.get_running_loop().time() + self._limits.body, False

        async def received() -> Message:
            nonlocal complete
            if complete:  # what comes now is the end of the connection, for which there is time
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            complete = not message.get("more_body", False)
            return message

        return received
