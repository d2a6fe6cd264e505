"""The Open Inference Protocol (KServe V2) over REST: JSON tensors, and tensors in binary behind a JSON header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from casemate.deploy.runtime import TOLERANCE, OnnxModel
from casemate.errors import shorten
from casemate.serving.limits import Limits, Refusal

HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.uint8): "UINT8", np.dtype(np.int64): "INT64"}
NUMBER_MEMORY, LIST_MEMORY = 96, 512  # bytes that a number and a list of JSON take while they are read
NUMBER_WRITING = 80  # and that one takes while JSON is written: an object, its place in a list, its text twice
BESIDES = 1000  # commas, lists and strings that a request may have besides its images'
Name = Annotated[str, Field(max_length=200)]


class Parameters(BaseModel):
    binary_data_size: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    binary_data: bool | None = None
    binary_data_output: bool | None = None


class RequestInput(BaseModel):
    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(max_length=8)]
    datatype: Name
    parameters: Parameters | None = None
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    name: Name
    parameters: Parameters | None = None


class InferRequest(BaseModel):
    id: Name | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=8)]
    outputs: Annotated[list[RequestOutput], Field(max_length=16)] | None = None


class ResponseOutput(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float] | None = None
    parameters: Parameters | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutput]


@dataclass(frozen=True)
class Query:
    """What a client asks: images in the file's own layout and type, and outputs with whether each comes in binary."""

    id: str | None
    images: np.ndarray
    outputs: Mapping[str, bool]


def memory(text: bytes, model: OnnxModel, limits: Limits) -> int:
    """Bytes that reading this JSON may take, many times its own size. Raises Refusal if it has more numbers, lists or
    strings than a request can have: that is seen before anything is read."""
    native = model.input.native
    numbers, lists = text.count(b","), text.count(b"[") + text.count(b"{")
    if text.count(b'"') > 2 * BESIDES:
        raise _malformed("hundreds of strings, and tensors have none")
    if lists > limits.images * sum(math.prod(native[:depth]) for depth in range(len(native))) + BESIDES:
        raise _malformed(f"{lists} lists, and images of shape {[*native]} have fewer")
    if numbers > limits.images * math.prod(native) + BESIDES:
        raise Refusal(413, "images", f"{numbers} values are more than {limits.images} images have")
    return NUMBER_MEMORY * numbers + LIST_MEMORY * lists


def answer_memory(query: Query, model: OnnxModel) -> int:
    """Bytes that writing the answer takes, and the answer itself."""
    sizes = {output.name: (math.prod(output.shape), output.dtype.itemsize) for output in model.per_image}
    each = sum(
        count * (2 * width if query.outputs[name] else NUMBER_WRITING)
        for name, (count, width) in sizes.items()
        if name in query.outputs
    )
    return len(query.images) * each


def read_query(text: bytes, tail: memoryview, model: OnnxModel, limits: Limits) -> Query:
    """Of a body in its two parts. Raises Refusal for whatever is not a request that this model can answer."""
    try:
        request = InferRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _malformed(f"{where}: {first['msg']}" if where else first["msg"]) from None
    if len(request.inputs) != 1:
        raise _malformed(f"{len(request.inputs)} inputs, and the model takes one: {model.input.name!r}")
    return Query(request.id, _images(request.inputs[0], tail, model, limits), _outputs(request, model))


def _malformed(message: str) -> Refusal:
    return Refusal(400, "malformed", f"not a V2 inference request: {shorten(message, 300)}")


def split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """(JSON, binary tensors behind it). Raises Refusal if the header does not say how long the first is."""
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.isdigit()) or not 0 < int(header_length[:9]) <= len(body):
        raise _malformed(f"{HEADER_LENGTH} {shorten(header_length)!r}, and the body has {len(body)} bytes")
    return body[: int(header_length[:9])], memoryview(body)[int(header_length[:9]) :]


def _images(given: RequestInput, tail: memoryview, model: OnnxModel, limits: Limits) -> np.ndarray:
    wanted = np.dtype(np.uint8 if model.input.uint8 else np.float32)
    if given.name != model.input.name:
        raise Refusal(400, "name", f"no input {shorten(given.name)!r}; the model takes {model.input.name!r}")
    if given.datatype != DATATYPES[wanted]:
        raise Refusal(400, "datatype", f"datatype {shorten(given.datatype)!r}; the model takes {DATATYPES[wanted]}")
    if tuple(given.shape[1:]) != model.input.native or not given.shape:
        raise Refusal(400, "shape", f"shape {given.shape}; the model takes [N, {str([*model.input.native])[1:]}")
    if not given.shape[0]:
        raise Refusal(400, "empty", "an empty batch; give at least one image")
    if given.shape[0] > limits.images:
        raise Refusal(413, "images", f"{given.shape[0]} images; one request may have {limits.images}")
    count = int(np.prod(given.shape))
    size = given.parameters.binary_data_size if given.parameters else None
    if size is None:
        if len(tail):
            raise _malformed(f"{len(tail)} bytes behind the JSON that no binary_data_size announces")
        values = _numbers(given.data, count, wanted)
    elif given.data is not None:
        raise _malformed("inputs.0 has both data and a binary_data_size")
    elif size != len(tail) or size != count * wanted.itemsize:
        raise Refusal(400, "shape", f"binary_data_size {size}, {len(tail)} bytes behind the JSON, and shape "
                      f"{given.shape} of {given.datatype} needs {count * wanted.itemsize}")  # fmt: skip
    else:
        values = np.frombuffer(tail, wanted.newbyteorder("<")).astype(wanted, copy=False)
    return check_values(values).reshape(given.shape)


def _numbers(data: list[Any] | None, count: int, wanted: np.dtype[Any]) -> np.ndarray:
    """JSON numbers, flat or nested, as `count` values of the type `wanted`."""
    if data is None:
        raise _malformed("inputs.0 has neither data nor a binary_data_size")
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) > 1:
            raise Refusal(400, "shape", "data is nested unevenly")
        data = list(chain.from_iterable(data))
    if len(data) != count:
        raise Refusal(400, "shape", f"data has {len(data)} values and the shape needs {count}")
    if set(map(type, data)) - ({int} if wanted == np.uint8 else {int, float}):  # True is none of them
        kind = "whole numbers" if wanted == np.uint8 else "numbers"
        raise Refusal(400, "datatype", f"data must be {kind}, flat or nested as the shape says")
    if wanted == np.uint8 and (min(data) < 0 or max(data) > 255):
        raise Refusal(422, "range", "values outside [0, 255]")
    try:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused like any other infinity
            return np.array(data, np.float64).astype(wanted)
    except OverflowError:
        raise Refusal(422, "range", "a value of hundreds of digits; images are in [0, 1]") from None


def check_values(values: np.ndarray) -> np.ndarray:
    """The values themselves. Raises Refusal unless they are finite and in [0, 1]; uint8 always is."""
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())  # extrema carry NaN along
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refusal(422, "not_finite", "images have values that are NaN or infinite")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise Refusal(422, "range", f"values from {low:.6g} to {high:.6g}; images are in [0, 1]")
    return values


def _outputs(request: InferRequest, model: OnnxModel) -> dict[str, bool]:
    every = bool(request.parameters and request.parameters.binary_data_output)
    known = [output.name for output in model.per_image]
    if not request.outputs:
        return dict.fromkeys(known, every)
    found = {}
    for output in request.outputs:
        if output.name not in known:
            raise Refusal(400, "name", f"no output {shorten(output.name)!r}; the model gives {', '.join(known)}")
        own = output.parameters.binary_data if output.parameters else None
        found[output.name] = every if own is None else own
    return found


def write_answer(
    found: Mapping[str, np.ndarray], query: Query, name: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of the response."""
    outputs, tail = [], []
    for output, binary in query.outputs.items():
        values = found[output]
        told: dict[str, Any] = {"name": output, "shape": list(values.shape), "datatype": DATATYPES[values.dtype]}
        if binary:
            tail.append(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
            told["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            told["data"] = values.ravel().tolist()
        outputs.append(told)
    answer = {"model_name": name, "model_version": version, "outputs": outputs}
    if query.id is not None:
        answer["id"] = query.id
    text = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    if not tail:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *tail]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def signature(name: str, version: str, model: OnnxModel) -> dict[str, Any]:
    """The model's metadata as the protocol words them."""
    kind = DATATYPES[np.dtype(np.uint8 if model.input.uint8 else np.float32)]
    return {
        "name": name, "versions": [version], "platform": "onnxruntime_onnx",
        "inputs": [_described(model.input.name, kind, model.input.native)],
        "outputs": [_described(o.name, DATATYPES[o.dtype], o.shape) for o in model.per_image],
    }  # fmt: skip


def _described(name: str, datatype: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1, *shape]}
