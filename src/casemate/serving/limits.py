"""What the server allows a client, and what it answers one that goes beyond."""

from __future__ import annotations

from dataclasses import dataclass

from casemate.errors import UserError

MIB = 1 << 20
NUMBER_CHARACTERS = 26  # of a float in JSON, with its comma and brackets
ENVELOPE = 1 << 16  # bytes of a request besides its numbers


@dataclass(frozen=True)
class Limits:
    """Each is a promise to the operator: whatever clients send, the process uses no more than this.

    images: of one request. batch: images that the model is run on at once. wait: seconds that a batch may wait for
    company. queue: images that may wait for the model. requests: being read or answered at once. pixels and picture
    (bytes): of an uploaded picture. held: bytes of all request bodies at once, with what reading them takes and
    with large answers until they are taken.
    connections: open at once, idle ones among them. Seconds that a client has: `headers` to send them, `body`
    likewise, `answer` until it is answered or told to come back, `writing` to take its answer.
    """

    images: int = 256
    batch: int = 64
    wait: float = 0.001
    queue: int = 1024
    requests: int = 256
    pixels: int = 16_000_000
    picture: int = 16 * MIB
    held: int = 256 * MIB
    connections: int = 512
    headers: float = 20.0
    body: float = 20.0
    answer: float = 30.0
    writing: float = 20.0

    def tensor_bytes(self, numbers: int) -> int:
        """The largest body of a tensor request, an image being so many numbers."""
        return min(self.images * numbers * NUMBER_CHARACTERS + ENVELOPE, self.held // 2)


class Refusal(UserError):
    """A request that is not served: an HTTP status, a word for the metrics, and one line for the client."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason
