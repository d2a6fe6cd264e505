"""A started server under requests made from its own schema, and under valid ones with something broken in them.

Nothing may be a 5xx, nothing may go without the answer that the schema promises, and the process must live. The gate
sends some hundred, the full tier at least 20,000.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.serving_toys import SHAPE, Server, binary, request
from tests.test_serving import GREY, encoded

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
INFER = "/v2/models/digits-row/infer"
HEADERS = ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length", "Accept", "Expect")
VALUES = ("", "gzip", "-5", "image/png", "1e9", "100-continue", "\xff", "x" * 999)
IMAGES = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.serving_toys import released

    folder = tmp_path_factory.mktemp("fuzz")
    with Server(released(folder / "champion"), "--timeout", "5", folder=folder) as started:
        yield started
        assert started.process.poll() is None
        assert started.infer(request(IMAGES))[0] == 200
    assert "Traceback" not in started.log.read_text()


def from_schema(server: Server, each: int) -> int:
    """`each` requests, or as many as there are, for every operation of the schema; returns how many were sent."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=each, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=CHECKS)

        send()
    return sent


class Breaker:
    """Valid requests with one thing broken: a key, a number, some bytes, a header. Seeded."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.picture = encoded(GREY.resize((20, 20)).convert("RGB"))
        self.jpeg = encoded(GREY.resize((20, 20)).convert("RGB"), "JPEG")

    def __call__(self) -> tuple[str, bytes, dict[str, str]]:
        """(path, body, headers)."""
        make = (self.json, self.binary, self.image)[self.rng.integers(3)]
        path, body, headers = make()
        if self.rng.random() < 0.05:
            key = self.pick(
                ["Content-Type", "Content-Encoding", "Inference-Header-Content-Length", "Accept", "Expect"]
            )
            headers = {
                **headers,
                key: self.pick(["", "gzip", "-5", "image/png", "1e9", "100-continue", "\xff", "x" * 999]),
            }
        return path, body, headers

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def strange(self) -> Any:
        return self.pick([
            None, True, -1, 0, 2**31, 2**63, 2**200, 1.5, float("nan"), float("inf"), -0.0, 1e308, "", "image", "\0",
            "x" * 5000, ["x" * 3000] * 300, [[]] * 3000, [{}] * 500, [True] * 128,
            [], {}, [[]], [None], {"a": []}, "FP32", "FP64", [1, 1, 8, 8], [0, 1, 8, 8], [1 << 40] * 4,
        ])  # fmt: skip

    def json(self) -> tuple[str, bytes, dict[str, str]]:
        told: Any = {**request(IMAGES[: self.rng.integers(1, 3)]), "id": "a", "outputs": [{"name": "logits"}]}
        self.spoil(told)
        body = json.dumps(told).encode()
        return INFER, self.damage(body) if self.rng.random() < 0.2 else body, {}

    def spoil(self, told: Any) -> None:
        """Replace, delete or add one thing somewhere inside."""
        while True:
            keys = list(told) if isinstance(told, dict) else list(range(len(told)))
            key = self.pick(keys) if keys else None
            inner = None if key is None else told[key]
            if isinstance(inner, dict | list) and inner and self.rng.random() < 0.8:
                told = inner
                continue
            if key is None or (isinstance(told, dict) and self.rng.random() < 0.1):
                if isinstance(told, dict):
                    told[self.pick(["", "parameters", "inputs", "x"])] = self.strange()
            elif self.rng.random() < 0.2:
                del told[key]
            else:
                told[key] = self.strange()
            return

    def binary(self) -> tuple[str, bytes, dict[str, str]]:
        body, headers = binary(IMAGES)
        return INFER, self.damage(body), headers

    def image(self) -> tuple[str, bytes, dict[str, str]]:
        kind = self.pick(["png", "jpeg"])
        return (
            "/predict",
            self.damage(self.picture if kind == "png" else self.jpeg),
            {"Content-Type": f"image/{kind}"},
        )

    def damage(self, body: bytes) -> bytes:
        found = np.frombuffer(body, np.uint8).copy()
        found[self.rng.integers(0, len(found), self.rng.integers(0, 6))] = self.rng.integers(0, 256)
        end = len(found) if self.rng.random() < 0.7 else int(self.rng.integers(0, len(found)))
        return found[:end].tobytes()


def broken_requests(server: Server, count: int, seed: int = 0) -> dict[int, int]:
    """How often each status was answered to `count` requests over kept connections."""
    make, statuses = Breaker(seed), dict[int, int]()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for _ in range(count):
        path, body, headers = make()
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):  # closed after the answer before, as HTTP allows
            connection.close()
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
        content = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status < 500, (path, body, headers, content)
        if answer.status != 200:
            line = json.loads(content)["error"]
            assert line and "\n" not in line and len(line) < 500
    connection.close()
    return statuses


@pytest.mark.slow
def test_a_few_of_everything(server: Server) -> None:
    sent = from_schema(server, 12)
    statuses = broken_requests(server, 600)
    assert sent >= 60 and statuses[200] > 50 and statuses[400] > 100 and 422 in statuses


def resident(server: Server) -> float:
    """MiB that the server's process has in memory."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    (kib,) = (line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))
    return int(kib) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's memory here")
def test_memory_stays_where_it_is(server: Server) -> None:
    broken_requests(server, 600, seed=2)
    before = resident(server)
    broken_requests(server, 1200, seed=3)
    assert resident(server) < before + 24


@pytest.mark.full
def test_twenty_thousand(server: Server) -> None:
    sent = from_schema(server, 400)
    statuses = broken_requests(server, 20_000 - min(sent, 8_000), seed=1)
    print(f"{sent} requests from the schema, {sum(statuses.values())} broken ones: {statuses}")
    assert sent + sum(statuses.values()) >= 20_000
