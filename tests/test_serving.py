"""The parts of the server by themselves: batching, tensors, pictures."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.responses import PlainTextResponse

from casemate.deploy.runtime import OnnxModel
from casemate.serving import app, tensors
from casemate.serving.batching import Batcher
from casemate.serving.intake import Bounded, Intake
from casemate.serving.limits import Limits, Refusal
from casemate.serving.pictures import picture_type, read_picture
from casemate.serving.service import Service
from casemate.serving.tensors import Query, answer_memory, memory, read_query, split, write_answer
from tests.serving_toys import SHAPE, binary, binary_answer, released, request, write_model

LIMITS = Limits(images=8, batch=4, queue=12, answer=5, wait=0.02)
IMAGES = np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return OnnxModel(write_model(tmp_path_factory.mktemp("serving") / "model.onnx"), "cpu")


# --- batching -----------------------------------------------------------------------------------------------


class Slow:
    """Doubles its images; each run waits for `go`."""

    def __init__(self) -> None:
        self.go, self.runs = threading.Event(), []

    def __call__(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        assert self.go.wait(10)
        self.runs.append((len(images), tuple(outputs)))
        return dict.fromkeys(outputs, 2 * images)


def ask(batcher: Batcher, *values: float, outputs: Sequence[str] = ("a",)) -> asyncio.Task[dict[str, np.ndarray]]:
    return asyncio.create_task(batcher.answer(np.array(values), outputs))


def test_what_waits_together_is_run_together_and_each_gets_its_own() -> None:
    async def go() -> None:
        model = Slow()
        async with Batcher(model, LIMITS) as batcher:
            first = ask(batcher, 1)
            await asyncio.sleep(0.05)  # it is at the model now
            rest = [ask(batcher, 2, 3), ask(batcher, 4, outputs=("b",)), ask(batcher, 5, 6), ask(batcher, 7)]
            await asyncio.sleep(0)
            assert batcher.waiting == 6
            model.go.set()
            assert (await first)["a"].tolist() == [2]
            found = await asyncio.gather(*rest)
            assert [f[n].tolist() for f, n in zip(found, "abaa", strict=True)] == [[4, 6], [8], [10, 12], [14]]
            assert "b" not in found[0]
        # never more than 4 images, in order of arrival, one output asked for by anybody is made for all
        assert model.runs == [(1, ("a",)), (3, ("a", "b")), (3, ("a",))]

    asyncio.run(go())


def test_a_request_of_more_than_a_batch_is_run_in_parts() -> None:
    async def go() -> None:
        model, seen = Slow(), []
        model.go.set()
        async with Batcher(model, LIMITS, seen.append) as batcher:
            assert (await ask(batcher, *range(9)))["a"].tolist() == [2 * value for value in range(9)]
        assert [images for images, _ in model.runs] == seen == [4, 4, 1]

    asyncio.run(go())


def test_a_full_queue_and_a_slow_model_turn_requests_away() -> None:
    async def go() -> None:
        model = Slow()
        async with Batcher(model, Limits(batch=4, queue=4, answer=0.2)) as batcher:
            running = ask(batcher, 1)
            await asyncio.sleep(0.05)
            waiting = ask(batcher, 2, 3, 4)
            await asyncio.sleep(0)
            with pytest.raises(Refusal, match="3 images are waiting") as full:
                await batcher.answer(np.array([5.0, 6.0]), ["a"])
            for task in (running, waiting):
                with pytest.raises(Refusal, match=r"not answered within 0\.2 s") as late:
                    await task
            assert (full.value.status, late.value.status) == (429, 503)
            model.go.set()
            assert (await batcher.answer(np.array([7.0]), ["a"]))["a"].tolist() == [14]
        assert model.runs == [(1, ("a",)), (1, ("a",))]  # nothing was run for the client that had given up

    asyncio.run(go())


def test_an_error_of_the_model_is_the_requests_and_the_batcher_lives() -> None:
    async def go() -> None:
        def model(images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
            if images[0] < 0:
                raise RuntimeError("broken")
            return {"a": images}

        async with Batcher(model, LIMITS) as batcher:
            with pytest.raises(RuntimeError, match="broken"):
                await batcher.answer(np.array([-1.0]), ["a"])
            assert (await batcher.answer(np.array([1.0]), ["a"]))["a"].tolist() == [1] and batcher.alive
        assert not batcher.alive

    asyncio.run(go())


def test_no_memory_for_a_batch_is_the_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise MemoryError

    async def go() -> None:
        model = Slow()
        async with Batcher(model, LIMITS) as batcher:
            first = ask(batcher, 1)
            await asyncio.sleep(0.05)
            together = [ask(batcher, 2), ask(batcher, 3)]
            await asyncio.sleep(0)
            with monkeypatch.context() as patched:
                patched.setattr(np, "concatenate", none)
                model.go.set()
                await first
                for request in together:
                    with pytest.raises(MemoryError):
                        await request
            assert (await batcher.answer(np.array([4.0]), ["a"]))["a"].tolist() == [8] and batcher.alive

    asyncio.run(go())


# --- tensors ------------------------------------------------------------------------------------------------


def read(body: bytes, header_length: str | None, model: OnnxModel) -> Query:
    """As the route does."""
    text, tail = split(body, header_length)
    memory(text, model, LIMITS)
    return read_query(text, tail, model, LIMITS)


def test_json_and_binary_say_the_same(model: OnnxModel) -> None:
    flat = request(IMAGES)
    flat["inputs"][0]["data"] = IMAGES.ravel().tolist()
    body, headers = binary(IMAGES, id="7")
    forms = [
        read(json.dumps(request(IMAGES)).encode(), None, model),
        read(json.dumps(flat).encode(), None, model),
        read(body, headers["Inference-Header-Content-Length"], model),
    ]
    for query in forms:
        np.testing.assert_array_equal(query.images, IMAGES)
        assert list(query.outputs) == ["logits", "probabilities", "manifold_score"]
    found = model.run(IMAGES)
    text, told = write_answer(found, forms[0], "m", "3")
    answer = json.loads(text)
    assert (answer["model_name"], answer["model_version"], "id" in answer) == ("m", "3", False)
    assert told == {"Content-Type": "application/json"}
    for output in answer["outputs"]:
        expected = found[output["name"]]
        np.testing.assert_array_equal(np.float32(output["data"]).reshape(output["shape"]), expected)
    packed, told = write_answer(found, forms[2], "m", "3")
    assert json.loads(packed[: int(told["Inference-Header-Content-Length"])])["id"] == "7"
    for name, values in binary_answer({k.lower(): v for k, v in told.items()}, packed).items():
        np.testing.assert_array_equal(values, found[name])


def test_the_memory_of_an_answer_is_more_than_it_takes(model: OnnxModel) -> None:
    found = model.run(IMAGES)
    for form in (json.dumps(request(IMAGES)).encode(), None):
        body, headers = binary(IMAGES) if form is None else (form, {})
        query = read(body, headers.get("Inference-Header-Content-Length"), model)
        written = len(write_answer(found, query, "", "")[0])
        assert written - 500 < answer_memory(query, model) < 20 * written  # 500: what is no number


def test_a_large_answer_is_counted_until_it_is_taken(
    tmp_path: Path, model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in a thread, its memory reserved while it is sent, refused where there is not so much."""
    folder, reserved = released(tmp_path / "champion"), []

    class Counting(Intake):
        @contextmanager
        def reserved(self, size: int) -> Iterator[None]:
            with super().reserved(size):
                reserved.append(size)
                yield
            reserved.append(-size)

    monkeypatch.setattr(app, "Intake", Counting)
    monkeypatch.setattr(app, "LARGE", 1000)
    body = json.dumps(request(IMAGES)).encode()
    told: list[int] = []

    async def post(limits: Limits) -> tuple[int, bytes]:
        service = Service.load(folder, limits, device="cpu")
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            told.append(sum(reserved))
            sent.append(message)

        path = f"/v2/models/{service.name}/infer"
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("", 1),
        }  # fmt: skip
        async with service.open():
            await app.build_app(service)(scope, receive, send)
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])

    status, answer = asyncio.run(post(LIMITS))
    query = read(body, None, model)
    size = answer_memory(query, model)
    assert status == 200 and size > 1000 and set(told) == {size} and sum(reserved) == 0
    np.testing.assert_allclose(
        json.loads(answer)["outputs"][0]["data"], model.run(IMAGES)["logits"].ravel(), rtol=1e-5
    )
    monkeypatch.setattr(tensors, "NUMBER_WRITING", 100_000)
    status, answer = asyncio.run(post(Limits(held=4 << 20)))
    assert (status, sum(reserved)) == (413, 0) and b"takes more than 4 MiB; use binary tensors" in answer


def changed(**changes: Any) -> bytes:
    made = request(IMAGES)
    made["inputs"][0] |= changes
    return json.dumps(made).encode()


def pixel(value: Any) -> bytes:
    data = IMAGES.ravel().tolist()
    data[17] = value
    return changed(data=data)


BAD_TENSORS = {
    "no JSON": (b"{", 400, "EOF"), "nothing": (b"", 400, "EOF"), "a list": (b"[]", 400, "object"),
    "no inputs": (b'{"inputs": []}', 400, "at least 1"), "two inputs": (
        json.dumps({"inputs": request(IMAGES)["inputs"] * 2}).encode(), 400, "2 inputs"),
    "another input": (changed(name="x"), 400, "no input 'x'; the model takes 'image'"),
    "another datatype": (changed(datatype="INT64"), 400, "'INT64'; the model takes FP32"),
    "another shape": (changed(shape=[3, 1, 8, 9]), 400, r"\[N, 1, 8, 8\]"), "no batch": (
        changed(shape=[1, 8, 8]), 400, r"\[N, 1, 8, 8\]"), "no shape": (changed(shape=[]), 400, "takes"),
    "a negative shape": (changed(shape=[-1, 1, 8, 8]), 400, r"inputs\.0\.shape\.0"),
    "an empty batch": (changed(shape=[0, 1, 8, 8], data=[]), 400, "empty batch"),
    "too many images": (changed(shape=[9, 1, 8, 8]), 413, "9 images; one request may have 8"),
    "too few numbers": (changed(data=[0.5]), 400, "1 values and the shape needs 192"),
    "uneven": (changed(data=[[0.5], [0.5, 0.5]]), 400, "unevenly"),
    "no data": (changed(data=None), 400, "neither data nor"), "text": (pixel("0.5"), 400, "must be numbers"),
    "null": (pixel(None), 400, "must be numbers"), "a huge number": (pixel(10**400), 422, "hundreds of digits"),
    "true": (pixel(True), 400, "must be numbers"), "lists and numbers": (changed(data=[[0.5], 0.5]), 400, "unevenly"),
    "texts": (changed(data=["x" * 1000] + [""] * 191), 400, "must be numbers"),
    "many texts": (changed(data=["x" * 100_000] + [""] * 50_000), 400, "strings"),
    "many lists": (changed(data=[[]] * 10_000), 400, "10005 lists"),
    "many objects": (changed(data=[{}] * 10_000), 400, "lists"),
    "many numbers": (changed(data=[0] * 10_000), 413, "more than 8 images have"),
    "NaN": (pixel(float("nan")), 422, "NaN or infinite"), "Inf": (pixel(float("inf")), 422, "NaN or infinite"),
    "beyond float32": (pixel(1e300), 422, "NaN or infinite"), "above 1": (pixel(1.5), 422, r"to 1\.5; images are in"),
    "below 0": (pixel(-0.25), 422, r"from -0\.25"), "deep": (b"[" * 10**6, 400, "lists"),
    "less deep": (b"[" * 900, 400, "."),
    "a long name": (changed(name="x" * 10**6), 400, r"inputs\.0\.name"),
    "an unknown output": (json.dumps({**request(IMAGES), "outputs": [{"name": "y"}]}).encode(), 400, "no output 'y'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_requests_that_cannot_be_answered(case: str, model: OnnxModel) -> None:
    body, status, words = BAD_TENSORS[case]
    with pytest.raises(Refusal, match=words) as caught:
        read(body, None, model)
    assert caught.value.status == status and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b, n: (b[:-4], n), "needs 768"), (lambda b, n: (b + b"1234", n), "needs 768"),
        (lambda b, n: (b, "-1"), "Length"), (lambda b, n: (b, "x" * 10**6), "Length"), 
(lambda b, n: (b, "0"), "Length"),
        (lambda b, n: (b, str(len(b) + 1)), "Length"), (lambda b, n: (b, "9" * 5000), "Length"),
        (lambda b, n: (b, str(len(b))), "JSON"), (lambda b, n: (b[int(n) :], None), "JSON"),
        (lambda b, n: (b[: int(n)] + b"\xff" * 768, n), "NaN"),
    ],
)  # fmt: skip
def test_binary_requests_that_do_not_add_up(change: Any, words: str, model: OnnxModel) -> None:
    body, headers = binary(IMAGES)
    with pytest.raises(Refusal, match=words) as caught:
        read(*change(body, headers["Inference-Header-Content-Length"]), model)
    assert caught.value.status in (400, 422) and len(str(caught.value)) < 500


def test_bytes_behind_the_json_that_nothing_announces(model: OnnxModel) -> None:
    text = json.dumps(request(IMAGES)).encode()
    with pytest.raises(Refusal, match="4 bytes behind the JSON"):
        read(text + b"1234", str(len(text)), model)


# --- what clients may hold ------------------------------------------------------------------------------------


def test_memory_for_reading_counts_with_the_bodies(model: OnnxModel) -> None:
    intake, text = Intake(Limits(held=100_000)), json.dumps(request(IMAGES)).encode()
    needed = memory(text, model, LIMITS)
    assert 80_000 > needed > 192 * 90
    with intake.reserved(needed), pytest.raises(Refusal, match="too many large") as busy, intake.reserved(90_000):
        raise AssertionError("reserved")
    with pytest.raises(Refusal, match="use binary tensors") as large, intake.reserved(100_001):
        raise AssertionError("reserved")
    assert (busy.value.status, large.value.status) == (429, 413)
    with intake.reserved(100_000):
        pass


def test_bodies_of_another_application_are_bounded() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        size, message = 0, {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            size += len(message.get("body", b""))
        gone = message["type"] == "http.disconnect"
        await PlainTextResponse("gone" if gone else str(size))(scope, receive, send)

    async def ask(headers: list[tuple[bytes, bytes]], *bodies: bytes) -> tuple[int, bytes]:
        parts = [{"type": "http.request", "body": body, "more_body": True} for body in bodies[:-1]]
        parts += [{"type": "http.request", "body": body} for body in bodies[-1:]]
        sent: list[Any] = []

        async def receive() -> Any:
            return parts.pop(0) if parts else await asyncio.sleep(10)

        async def send(message: Any) -> None:
            sent.append(message)

        await bounded({"type": "http", "method": "POST", "headers": headers}, receive, send)
        return sent[0]["status"], sent[1]["body"]

    def declared(size: int) -> list[tuple[bytes, bytes]]:
        return [(b"content-length", str(size).encode())]

    bounded = Bounded(app, Limits(body=0.1, held=150), 100)
    assert asyncio.run(ask(declared(6), b"abc", b"def")) == (200, b"6")
    assert asyncio.run(ask(declared(6))) == (200, b"gone")  # nothing comes
    assert asyncio.run(ask(declared(101), b"abc"))[0] == 413
    assert asyncio.run(ask([(b"transfer-encoding", b"chunked")], b"abc"))[0] == 411

    async def both() -> list[tuple[int, bytes]]:
        return await asyncio.gather(ask(declared(90)), ask(declared(90), b"abc"))

    assert [status for status, _ in asyncio.run(both())] == [200, 429]


# --- pictures -----------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


LEVELS = np.random.default_rng(2).integers(0, 256, (8, 8), np.uint8)
GREY = Image.fromarray(LEVELS)


def test_a_picture_of_the_models_shape_is_left_alone() -> None:
    found = read_picture(encoded(GREY), "image/png", SHAPE, LIMITS)
    np.testing.assert_array_equal(found.image, LEVELS[None, None] / np.float32(255))
    assert (found.changes, found.size, found.image.dtype) == ((), (8, 8), np.float32)


def test_what_is_done_to_a_picture_is_said() -> None:
    wide = read_picture(encoded(Image.new("RGB", (40, 20), (255, 0, 0)), "JPEG"), "image/jpeg", SHAPE, LIMITS)
    assert wide.changes == ("colours turned to grey", "resized from 40 x 20 to 8 x 8, bilinear")
    assert wide.image == pytest.approx(76 / 255, abs=2 / 255)  # 0.299 red
    three = read_picture(encoded(GREY), "image/png", (3, 8, 8), LIMITS)
    assert three.changes == ("grey repeated in three channels",) and three.image.shape == (1, 3, 8, 8)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_picture(encoded(clear), "image/png", SHAPE, LIMITS).changes == ("transparency laid on white",)
    assert read_picture(encoded(clear), "image/png", SHAPE, LIMITS).image.min() == 1
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = read_picture(encoded(GREY, exif=exif), "image/png", SHAPE, LIMITS)
    assert turned.changes == ("turned as its EXIF orientation says",)
    np.testing.assert_array_equal(turned.image[0, 0], LEVELS[::-1, ::-1] / np.float32(255))
    two = encoded(GREY, "MPO", save_all=True, append_images=[GREY.rotate(90)], quality=100)
    first = read_picture(two, "image/jpeg", SHAPE, LIMITS)
    assert first.changes == ("the first of 2 pictures in the file",)
    np.testing.assert_allclose(first.image[0, 0], LEVELS / 255, atol=3 / 255)
    for mode in ("1", "P", "LA", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        found = read_picture(encoded(GREY.convert(mode), kind), f"image/{kind.lower()}", SHAPE, LIMITS)
        assert found.image.shape == (1, *SHAPE)


BAD_PICTURES = {
    "nothing": (b"", 400, "empty"), "text": (b"hello", 400, "neither JPEG nor PNG"),
    "half a picture": (encoded(GREY.resize((64, 64)))[:900], 400, "not a picture"),
    "a header only": (encoded(GREY)[:40], 400, "not a picture"),
    "the other kind": (encoded(GREY, "JPEG"), 415, "the picture is JPEG"), 
"a GIF": (encoded(GREY, "GIF"), 400, "not a"),
    "16 bits": (encoded(Image.fromarray(LEVELS.astype(np.uint16))), 415, "8 bits for each channel"),
    "animated": (encoded(GREY, save_all=True, append_images=[GREY.rotate(90)]), 415, "animated"),
    "a large picture": (encoded(Image.new("1", (5000, 5000))), 413, "5000 x 5000 pixels; at most 16,000,000"),
    "a bomb": (encoded(Image.new("1", (30_000, 30_000))), 413, "too many pixels; at most 16,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_pictures_that_are_none(case: str) -> None:
    body, status, words = BAD_PICTURES[case]
    with pytest.raises(Refusal, match=words) as caught:
        read_picture(body, "image/png", SHAPE, LIMITS)
    assert caught.value.status == status and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_media_types() -> None:
    assert picture_type("image/PNG; charset=binary") == "image/png"
    for header in (None, "", "image/gif", "application/octet-stream", "x" * 10**6):
        with pytest.raises(Refusal, match="send image/jpeg or image/png") as caught:
            picture_type(header)
        assert caught.value.status == 415 and len(str(caught.value)) < 200


def test_any_damage_to_a_picture_is_a_refusal_or_a_picture() -> None:
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG"):
        whole = np.frombuffer(encoded(GREY.resize((32, 32)).convert("RGB"), kind), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), rng.integers(1, 8))] = rng.integers(0, 256)
            body = damaged[: rng.integers(1, len(whole) + 1)].tobytes()
            try:
                found = read_picture(body, f"image/{kind.lower()}", SHAPE, LIMITS)
            except Refusal as refusal:
                assert 400 <= refusal.status < 500
            else:
                assert found.image.shape == (1, *SHAPE) and 0 <= found.image.min() <= found.image.max() <= 1
