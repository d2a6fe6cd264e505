"""The routes: the Open Inference Protocol (KServe V2), a picture in and a class out, health, the card, metrics."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casemate.errors import shorten
from casemate.serving import tensors
from casemate.serving.intake import Intake
from casemate.serving.limits import Refusal
from casemate.serving.pictures import FORMATS, media_type, picture_type, read_picture
from casemate.serving.service import Answer, Service

DECODERS = 2  # pictures being decoded at once: each may need some 300 MB
LARGE = (
    1 << 18
)  # bytes of JSON from which it is read in a thread, and of memory from which an answer is written in one
TENSOR_TYPES = ("", "application/json", "application/octet-stream")  # "": clients of the protocol need not say


class Error(BaseModel):
    """Every refusal: one line that says what to mend."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 404, 405, 408, 411, 413, 415, 422, 429, 503)
}
PICTURE = {"requestBody": {"required": True, "content": {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS
}}}  # fmt: skip


def build_app(service: Service) -> FastAPI:
    """The application for one model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.open():
            yield

    app = FastAPI(
        title=f"casemate: {service.name}", version=service.version, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="A robust image classifier. Images are numbers in [0, 1], or JPEG and PNG files.",
        responses=REFUSALS,
    )  # fmt: skip
    app.add_middleware(Counted, service=service)
    _refusals(app, service)
    intake = Intake(service.limits)
    _protocol(app, service, intake)
    _pictures(app, service, intake)
    _about(app, service)
    return app


# --- about the server ---------------------------------------------------------------------------------------


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/", summary="What is served, and where")
    async def index() -> dict[str, Any]:
        return {
            "model": service.name, "version": service.version, "predict": "/predict",
            "infer": f"/v2/models/{service.name}/infer", "card": "/card", "metrics": "/metrics",
            "openapi": "/openapi.json",
        }  # fmt: skip

    @app.get("/card", summary="What the model is, and what it was tested at")
    async def card() -> dict[str, Any]:
        return service.about()

    @app.get("/metrics", summary="For Prometheus", response_class=Response, responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    })  # fmt: skip
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


# --- the Open Inference Protocol ----------------------------------------------------------------------------


def _protocol(app: FastAPI, service: Service, intake: Intake) -> None:
    limits, model = service.limits, service.model
    most = limits.tensor_bytes(model.input.shape[0] * model.input.shape[1] * model.input.shape[2])

    def served(name: str, version: str | None = None) -> None:
        if name != service.name:
            raise Refusal(404, "name", f"no model {shorten(name)!r} here; this server has {service.name!r}")
        if version not in (None, service.version):
            raise Refusal(404, "name", f"no version {shorten(str(version))!r}; there is {service.version!r}")

    # The busiest routes come first and read their parameters themselves: the framework's way needs 44 % more CPU
    # time for a request, measured without the network.
    async def infer(request: Request) -> Response:
        served(request.path_params["name"], request.path_params.get("version"))
        header = request.headers.get(tensors.HEADER_LENGTH)
        kind = media_type(request.headers.get("content-type"))
        if kind not in TENSOR_TYPES:
            raise Refusal(415, "media_type", f"Content-Type {shorten(kind)!r}; send {' or '.join(TENSOR_TYPES[1:])}")
        async with intake.body(request, most) as body:
            text, tail = tensors.split(body, header)
            with intake.reserved(tensors.memory(text, model, limits)):
                if len(text) > LARGE:
                    query = await asyncio.to_thread(tensors.read_query, text, tail, model, limits)
                else:
                    query = tensors.read_query(text, tail, model, limits)
            return await answered(query)

    async def answered(query: tensors.Query) -> Response:
        what = query, service.name, service.version
        size = tensors.answer_memory(query, model)
        if size <= LARGE:
            found = await service.tensors(query.images, list(query.outputs))
            content, headers = tensors.write_answer(found, *what)
            return Response(content, headers=headers)
        with ExitStack() as counted:
            counted.enter_context(intake.reserved(size))
            found = await service.tensors(query.images, list(query.outputs))
            content, headers = await asyncio.to_thread(tensors.write_answer, found, *what)
            return Reserved(content, headers, counted.pop_all())

    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        app.post(path, summary="Tensors in, tensors out", **_document(path))(infer)

    @app.get("/v2", summary="Server metadata")
    async def server() -> dict[str, Any]:
        from importlib.metadata import version

        return {"name": "casemate", "version": version("casemate"), "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", summary="The process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="The model can be asked")
    async def ready() -> dict[str, bool]:
        if not service.batcher.alive:
            raise Refusal(503, "busy", "the model is not running")
        return {"ready": True}

    @app.get("/v2/models/{name}", summary="Model metadata")
    @app.get("/v2/models/{name}/versions/{version}", summary="Model metadata of a version")
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        served(name, version)
        return tensors.signature(service.name, service.version, model)

    @app.get("/v2/models/{name}/ready", summary="The model can be asked")
    @app.get("/v2/models/{name}/versions/{version}/ready", summary="The version can be asked")
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        served(name, version)
        return {"name": service.name, **await ready()}


def _document(path: str) -> dict[str, Any]:
    """What the schema says of an inference route."""
    names = re.findall(r"{(\w+)}", path)
    places = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    header = {"name": tensors.HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 1},
              "description": "Bytes of JSON before tensors in binary."}  # fmt: skip
    content = {
        "application/json": {"schema": tensors.InferRequest.model_json_schema()},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return {
        "openapi_extra": {
            "parameters": [*places, header], "requestBody": {"required": True, "content": content}
        },
        "responses": {200: {"model": tensors.InferResponse, "content": {"application/octet-stream": {}}}},
    }  # fmt: skip


class Reserved(Response):
    """An answer whose memory is counted until the client has taken it."""

    def __init__(self, content: bytes, headers: dict[str, str], counted: ExitStack) -> None:
        super().__init__(content, headers=headers)
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._counted:
            await super().__call__(scope, receive, send)


# --- pictures -----------------------------------------------------------------------------------------------


def _pictures(app: FastAPI, service: Service, intake: Intake) -> None:
    decoding = asyncio.Semaphore(DECODERS)

    @app.post(
        "/predict", summary="A JPEG or PNG in, its class out", response_model=Answer, openapi_extra=PICTURE,
    )  # fmt: skip
    async def predict(request: Request) -> Answer:
        kind = picture_type(request.headers.get("content-type"))
        async with intake.body(request, service.limits.picture) as body:
            async with decoding:
                shape = service.model.input.shape
                picture = await asyncio.to_thread(read_picture, body, kind, shape, service.limits)
            return await service.picture(picture)


# --- refusals and counters ----------------------------------------------------------------------------------


def _refusals(app: FastAPI, service: Service) -> None:
    def told(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"error": message}, status, headers)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        service.metrics.rejected.labels(error.reason).inc()
        return told(error.status, str(error), {"Retry-After": "1"} if error.status in (429, 503) else None)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.rejected.labels("route").inc()
        place = f"{shorten(request.method, 20)} {shorten(request.url.path)}"
        words = {404: f"no route {place}; GET / lists them", 405: f"{place}: this route has other methods"}
        headers = dict(error.headers or {})
        return told(error.status_code, words.get(error.status_code, str(error.detail)), headers)

    async def gone(request: Request, error: Exception) -> Response:
        service.metrics.rejected.labels("disconnect").inc()
        return told(400, "the client went away")

    async def broken(request: Request, error: Exception) -> Response:
        return told(500, f"{type(error).__name__} in the server; its log has more")

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)


class Counted:
    """Counts requests by route and status, and turns away those beyond `limits.requests` at once."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.open = app, service, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.open += 1
        try:
            if self.open > self.service.limits.requests:
                busy = JSONResponse({"error": f"{self.open} requests at once; try again in a second"}, 429)
                self.service.metrics.rejected.labels("busy").inc()
                await busy(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        finally:
            self.open -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(time.perf_counter() - start)
