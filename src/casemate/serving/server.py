"""The process: a port, connections that cannot be held open for nothing, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import socket
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from casemate.errors import UserError
from casemate.serving.limits import Limits

KEEP_ALIVE = 10  # seconds between requests of one connection
GRACE = 10  # seconds that requests in flight have at the end
BACKLOG = 512
PARTING = 1  # second that a refused client has to read why and to end


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with so many connections and no more, and a limit of time for each thing that a client can leave half
    done: its headers, a body that nobody reads any more, and taking its answer. The body that is being read has its
    own limit in `Intake`."""

    limits: ClassVar[Limits] = Limits()
    open: ClassVar[set[PatientProtocol]] = set()
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _parting = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.open) >= self.limits.connections:
            transport.abort()
            return
        self.open.add(self)
        self._start(self.limits.headers, self._slow_headers)

    def data_received(self, data: bytes) -> None:
        if self._parting:
            return
        super().data_received(data)
        if self._parting:
            return
        if self.transport.is_closing():
            self._stop()
        elif self.conn.their_state is h11.IDLE:
            self._start(self.limits.headers, self._slow_headers)
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self._start(self.limits.body, self.transport.abort)
        else:
            self._stop()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """From here on the connection is another protocol's, which says when it is lost."""
        self.open.discard(self)
        self._stop()
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.writing, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.discard(self)
        self._stop()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As every other refusal: JSON with one line. The application, if it was asked already, is not heard."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps({"error": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._part()

    def _part(self) -> None:
        """Close after the client has: to close with something unread resets the connection, and what was answered can
        be lost with it."""
        if self.transport.is_closing():
            return
        self._parting = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._stop()
        self._start(PARTING, self.transport.abort)

    def _slow_headers(self) -> None:
        if self.conn.trailing_data[0]:
            self.send_400_response(f"the request's headers were not complete after {self.limits.headers:g} s")
        else:
            self.transport.close()

    def _start(self, seconds: float, then: Any) -> None:
        """The clock of one thing runs from its start; more data does not set it back."""
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(limits: Limits) -> type[PatientProtocol]:
    """The protocol with these limits."""
    return type("LimitedProtocol", (PatientProtocol,), {"limits": limits, "open": set()})


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the port is taken or the host is not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", None) or 0  # asked for its own words: `create_server` adds the address again
        reason = os.strerror(code) if code > 0 else getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another with --host or --port") from None


def address(listening: socket.socket) -> str:
    """The address of a page on this socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def run(app: Any, listening: socket.socket, limits: Limits, *, websockets: bool = False) -> None:
    """Serve until a signal; requests in flight are answered first."""
    config = uvicorn.Config(
        app, http=protocol(limits), ws="auto" if websockets else "none", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=GRACE, lifespan="on",
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # raised again by the server once it has ended well
        uvicorn.Server(config).run(sockets=[listening])
