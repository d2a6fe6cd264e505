"""A really started server: what it answers, what it refuses, and that it answers the next request all the same."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.responses import PlainTextResponse

import casemate
from casemate.deploy import card as cards
from casemate.deploy.card import MODEL
from casemate.serving.limits import Limits
from casemate.serving.server import listen, protocol
from tests.serving_toys import SHAPE, WEIGHTS, Server, binary, binary_answer, released, request

TIMEOUT = 1.0
IMAGES = np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32)
INFER = "/v2/models/digits-row/infer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("served") / "champion")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--timeout", str(TIMEOUT), "--images", "64", "--pixels", "1000000")
    with Server(folder, *options, folder=tmp_path_factory.mktemp("log")) as started:
        yield started
    assert started.process.returncode == 0
    said = set(started.log.read_text().splitlines())
    assert said <= {"WARNING:  Invalid HTTP request received."}  # no traceback


def picture(side: int = 8, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray((IMAGES[0, 0] * 255).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST).save(
        out, kind
    )
    return out.getvalue()


def lives(server: Server) -> None:
    """The next request is answered, and right."""
    body, headers = binary(IMAGES)
    status, told, answer = server.ask("POST", INFER, body, headers)
    assert status == 200
    expected = IMAGES.reshape(3, -1) @ WEIGHTS
    np.testing.assert_allclose(binary_answer(told, answer)["logits"], expected, rtol=1e-4, atol=1e-4)


# --- what it answers ----------------------------------------------------------------------------------------


def test_tensors_in_json_and_binary_are_what_load_predicts(server: Server, folder: Path) -> None:
    expected = casemate.load(folder, "cpu").predict(IMAGES)
    status, answer = server.infer({**request(IMAGES), "id": "a", "outputs": [{"name": "probabilities"}]})
    assert (status, answer["id"], answer["model_name"], answer["model_version"]) == (200, "a", "digits-row", "1")
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "FP32", [3, 10])
    np.testing.assert_allclose(np.reshape(output["data"], (3, 10)), expected.probabilities, rtol=1e-5)
    body, headers = binary(IMAGES)
    status, told, packed = server.ask("POST", "/v2/models/digits-row/versions/1/infer", body, headers)
    found = binary_answer(told, packed)
    assert status == 200 and set(found) == {"logits", "probabilities", "manifold_score"}
    np.testing.assert_array_equal(found["logits"], expected.logits)
    np.testing.assert_allclose(found["manifold_score"], expected.manifold_score, rtol=1e-6)


def test_a_picture_gets_a_class_and_what_the_model_was_tested_at(server: Server, folder: Path) -> None:
    status, _, body = server.ask("POST", "/predict", picture(), {"Content-Type": "image/png"})
    answer, expected = json.loads(body), casemate.load(folder, "cpu").predict((IMAGES[0] * 255).astype(np.uint8))
    assert status == 200 and answer["class"] == expected.names[0] and answer["picture"]["changes"] == []
    assert answer["probability"] == pytest.approx(float(expected.probabilities.max()), rel=1e-5)
    assert expected.manifold_score is not None
    assert answer["manifold_score"] == pytest.approx(float(expected.manifold_score[0]), rel=1e-5)
    tested = answer["tested"]
    assert (tested["norm"], tested["radius"], tested["robust"], tested["images"]) == ("linf", 0.1, 0.5, 400)
    status, _, body = server.ask("POST", "/predict", picture(50, "JPEG"), {"Content-Type": "image/jpeg"})
    assert status == 200 and json.loads(body)["picture"]["changes"] == ["resized from 50 x 50 to 8 x 8, bilinear"]


def test_health_metadata_and_card(server: Server) -> None:
    def get(path: str) -> dict[str, object]:
        status, _, body = server.ask("GET", path)
        assert status == 200
        found: dict[str, object] = json.loads(body)
        return found

    assert get("/v2/health/live") == {"live": True} and get("/v2/health/ready") == {"ready": True}
    assert get("/v2/models/digits-row/ready") == {"name": "digits-row", "ready": True}
    assert get("/v2")["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/digits-row", "/v2/models/digits-row/versions/1"):
        told = get(path)
        assert told["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        assert {"name": "manifold_score", "datatype": "FP32", "shape": [-1]} in told["outputs"]  # type: ignore[operator]
    card = get("/card")
    assert card["verified"] == "card" and card["card"]["threat"]["radius"] == 0.1  # type: ignore[index]
    assert get("/")["infer"] == INFER


def test_clients_at_once_share_batches_and_are_counted(server: Server) -> None:
    def counter(pattern: str) -> float:
        text = server.ask("GET", "/metrics")[2].decode()
        return sum(float(v) for v in re.findall(rf"^{pattern} ([0-9.e+]+)$", text, re.MULTILINE))

    names = ("casemate_batch_images_count", "casemate_batch_images_sum", "casemate_manifold_score_count",
             re.escape(f'casemate_requests_total{{route="{INFER.replace("digits-row", "{name}")}",status="200"}}'),
             re.escape('casemate_rejected_total{reason="range"}'))  # fmt: skip
    before = [counter(name) for name in names]
    body, headers = binary(IMAGES)

    def client(_: int) -> int:
        return sum(server.ask("POST", INFER, body, headers)[0] for _ in range(10))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [2000] * 8
    assert server.infer(request(IMAGES + 1))[0] == 422
    batches, images, scores, answered, refused = (
        counter(name) - old for name, old in zip(names, before, strict=True)
    )
    assert (images, scores, answered, refused) == (240, 240, 80, 1) and batches < 80


# --- what it refuses ----------------------------------------------------------------------------------------

PNG = {"Content-Type": "image/png"}
MANY = b"x" * 10**6
REFUSED: dict[str, tuple[str, str, bytes | None, dict[str, str], int, str]] = {
    "no route": ("GET", "/nothing", None, {}, 404, "no route"),
    "another method": ("DELETE", "/predict", None, {}, 405, "other methods"),
    "another model": ("GET", "/v2/models/other", None, {}, 404, "this server has 'digits-row'"),
    "another version": ("GET", "/v2/models/digits-row/versions/2", None, {}, 404, "no version '2'"),
    "a path": ("POST", "/v2/models/../../etc/passwd/infer", b"{}", {}, 404, "no route"),
    "a hidden path": ("POST", "/v2/models/..%2f..%2fetc%2fpasswd/infer", b"{}", {}, 404, "no route"),
    "dots": ("POST", "/v2/models/../infer", b"{}", {}, 404, "no model"),
    "a million letters": ("GET", "/v2/models/" + "x" * 10**6, None, {}, 400, "Invalid HTTP"),
    "a long header": ("GET", "/v2", None, {"X": "x" * 10**6}, 400, "Invalid HTTP"),
    "no JSON": ("POST", INFER, b"{", {}, 400, "EOF"),
    "a body over the limit": ("POST", INFER, b" " * 2_000_000, {}, 413, "larger than"),
    "a web page's": ("POST", INFER, b"{}", {"Content-Type": "text/plain"}, 415, "send application/json"),
    "a picture as tensors": ("POST", INFER, b"{}", PNG, 415, "'image/png'; send"),
    "a text of half a million letters": ("POST", INFER, json.dumps(
        {"inputs": [{"name": "image", "shape": [1, *SHAPE], "datatype": "FP32", "data": ["x" * 10**5] + [""] * 1500}]}
    ).encode(), {}, 400, "strings"),
    "compressed": ("POST", INFER, b"{}", {"Content-Encoding": "gzip"}, 415, "compressed"),
    "no media type": ("POST", "/predict", b"x", {}, 415, "image/jpeg or image/png"),
    "a form": ("POST", "/predict", b"x", {"Content-Type": "multipart/form-data"}, 415, "image/jpeg"),
    "an empty picture": ("POST", "/predict", b"", PNG, 400, "empty"),
    "half a picture": ("POST", "/predict", picture(200)[:150], PNG, 400, "not a picture"),
    "a large picture": ("POST", "/predict", picture(1001), PNG, 413, "1001 x 1001 pixels"),
    "a picture over the limit": ("POST", "/predict", MANY * 17, PNG, 413, "larger than"),
}  # fmt: skip
TENSORS = {
    "NaN": (np.full((1, *SHAPE), np.nan), 422, "NaN"), "Inf": (np.full((1, *SHAPE), np.inf), 422, "infinite"),
    "outside": (np.full((1, *SHAPE), 1.01), 422, "to 1.01"), "no images": (np.zeros((0, *SHAPE)), 400, "empty batch"),
    "many": (np.zeros((65, *SHAPE)), 413, "may have 64"), "shape": (np.zeros((1, 1, 8, 9)), 400, "the model takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_the_next_is_answered(case: str, server: Server) -> None:
    method, path, body, headers, status, words = REFUSED[case]
    found, told, answer = server.ask(method, path, body, headers)
    line = json.loads(answer)["error"]
    assert (found, told["content-type"]) == (status, "application/json")
    assert words in line and "\n" not in line and len(line) < 300
    lives(server)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_refused_in_both_forms(case: str, server: Server) -> None:
    images, status, words = TENSORS[case]
    found, answer = server.infer(request(images))
    assert found == status and words in answer["error"]
    body, headers = binary(images)
    found, _, raw = server.ask("POST", INFER, body, headers)
    assert found == status and words in json.loads(raw)["error"]
    lives(server)


def test_a_million_letters_in_a_body(server: Server) -> None:
    asked = request(IMAGES)
    for where in (asked["inputs"][0], asked):
        where["name" if where is not asked else "id"] = "x" * 10**6
        status, answer = server.infer(asked)
        assert status in (400, 413) and len(answer["error"]) < 300
    lives(server)


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"

# --- slow and strange clients -------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "drip", "words"),
    [
        (b"", b"", b""), (HEAD + b"X-", b"a", b" 400 "), (HEAD + b"Content-Length: 1000\r\n\r\n", b"a", b" 408 "),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"", b" 408 "),
    ],
    ids=["silent", "slow headers", "slow body", "stopped body"],
)  # fmt: skip
def test_clients_that_take_their_time(sent: bytes, drip: bytes, words: bytes, server: Server) -> None:
    with connected(server) as connection:
        start = time.monotonic()
        connection.sendall(sent)
        connection.settimeout(0.1)
        answer = b""
        while time.monotonic() < start + 10 * TIMEOUT:
            with contextlib.suppress(TimeoutError):
                part = connection.recv(1 << 16)
                if not part:
                    break
                answer += part
                if words == b" 408 ":
                    break
            with contextlib.suppress(OSError):
                connection.sendall(drip)
        took = time.monotonic() - start
    assert words in answer and 0.5 * TIMEOUT < took < 5 * TIMEOUT
    lives(server)


def test_a_client_that_does_not_take_its_answers(server: Server) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(5 * TIMEOUT + 10)
        with pytest.raises(ConnectionError):  # the server gives up; until then it stops reading what it cannot answer
            while True:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
    lives(server)


def test_clients_that_leave_and_clients_that_speak_something_else(server: Server) -> None:
    body, headers = binary(IMAGES)
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n" + "".join(
        f"{key}: {value}\r\n" for key, value in headers.items()
    )
    for sent in (head.encode()[:40], head.encode() + b"\r\n", head.encode() + b"\r\n" + body[:100],
                 head.encode() + b"\r\n" + body):  # fmt: skip
        with connected(server) as connection:
            connection.sendall(sent)
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 1000, b"GET\r\n\r\n", b"\r\n" * 1000):
        with connected(server) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            answer = everything(connection)
            assert not answer or b"400 Bad Request" in answer
    lives(server)


def test_a_client_that_sends_on_reads_why_it_is_refused(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET\r\n\r\n" + b"x" * (1 << 20))
        answer = b""
        while part := connection.recv(1 << 16):  # raises if the connection is reset
            answer += part
        assert b"400 Bad Request" in answer and answer.endswith(b'"}')
        start = time.monotonic()
        with pytest.raises(ConnectionError):  # it is not heard for ever
            while time.monotonic() < start + 15:
                connection.sendall(b"x" * (1 << 16))
    lives(server)


def test_chunked_bodies_and_kept_connections(server: Server) -> None:
    picture_bytes = picture()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(picture_bytes), picture_bytes)
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    endless = b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20)) * 17
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(head + chunks)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK")
        connection.sendall(head + b"zz\r\n")
        assert b"400 Bad Request" in everything(connection)
    with connected(server) as connection:
        connection.sendall(head + endless)
        assert b" 413 " in connection.recv(1 << 16)
    lives(server)


def test_no_more_connections_than_allowed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("here")(scope, receive, send)

    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(app, http=protocol(Limits(connections=2)), lifespan="off", log_level="warning")
        started = uvicorn.Server(config)
        thread = threading.Thread(target=started.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()

        def ask() -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return everything(connection)

        with contextlib.ExitStack() as held:
            for _ in range(2):
                held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            assert ask() == b""
        time.sleep(0.2)
        assert ask().endswith(b"here")
        started.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_a_connection_that_became_another_protocols_is_not_counted_for_ever() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})
        else:
            await PlainTextResponse("here")(scope, receive, send)

    limited = protocol(Limits(connections=1))
    with listen("127.0.0.1", 0) as listening:
        address = listening.getsockname()
        config = uvicorn.Config(app, http=limited, ws="auto", lifespan="off", log_level="warning")
        started = uvicorn.Server(config)
        thread = threading.Thread(target=started.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        upgrade = (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")  # fmt: skip
        for _ in range(3):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(upgrade)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 101")
            end = time.monotonic() + 5
            while limited.open and time.monotonic() < end:
                time.sleep(0.02)
            assert not limited.open
        started.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


# --- starting ------------------------------------------------------------------------------------------------


def failed(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from casemate.cli import main; main()", "serve", *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_file_that_failed_the_gate_is_served_with_a_warning(tmp_path: Path) -> None:
    made = released(tmp_path / "failed")
    card = cards.verify(made)
    low = cards.Worst(accuracy=0.25, low=0.2, high=0.3, n=900, attacks=("square",))
    gate = cards.Gate(passed=False, margin=0.02, served=low, table=None, checks=())
    cards.write(card.model_copy(update={"gate": gate, "robust": {**card.robust, "strong": low}}), made)
    with Server(made, folder=tmp_path) as started:
        assert "the release gate did NOT pass this file" in started.said
        _, _, body = started.ask("POST", "/predict", picture(), {"Content-Type": "image/png"})
    tested = json.loads(body)["tested"]  # of all suites the one that leaves least, not the one over all of them
    assert (tested["gate"], tested["suite"], tested["robust"], tested["images"]) == ("failed", "strong", 0.25, 900)


def test_what_cannot_be_served_is_one_line(server: Server, folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in failed(str(tmp_path / "gone.onnx"), "--port", "0")
    assert "choose another" in failed(str(folder), "--port", str(server.port))
    assert "names no model" in failed("models:/../../etc/passwd", "--port", "0")
    changed = released(tmp_path / "changed")
    with (changed / MODEL).open("ab") as file:
        file.write(b"\x00")
    assert "changed or exchanged" in failed(str(changed), "--port", "0")
