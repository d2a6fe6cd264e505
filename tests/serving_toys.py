"""A released model that is made in milliseconds, for tests of what loads and serves one."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from casemate.deploy.card import MODEL, Card, file_sha256, write
from casemate.deploy.metadata import Metadata
from tests.deploy_toys import ABOUT

SHAPE = (1, 8, 8)
WEIGHTS = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
RATE = {"accuracy": 0.75, "low": 0.7, "high": 0.8, "n": 400}


def write_model(
    path: Path,
    shape: tuple[int, int, int] = SHAPE,
    *,
    score: bool = True,
    detector: bool = False,
    weights: np.ndarray | None = None,
) -> Path:
    """A linear classifier in the form of an exported file; its manifold score is the sigmoid of the mean pixel."""
    weights = np.resize(WEIGHTS, (int(np.prod(shape)), 10)) if weights is None else weights
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ReduceMean", ["flat", "one"], ["mean"], keepdims=0),
        helper.make_node("Sigmoid", ["mean"], ["manifold_score"]),
    ]
    if detector:  # flags images whose mean is above 1/2
        half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
        nodes.append(helper.make_node("Sub", ["mean", "half"], ["detector"]))
    images = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *shape])
    outputs: list[tuple[str, list[Any]]] = [("logits", ["batch", 10]), ("probabilities", ["batch", 10])]
    outputs += [("manifold_score", ["batch"])] * score + [("detector", ["batch"])] * detector
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, form) for name, form in outputs]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1]), "one")]
    constants += [half] if detector else []
    graph = helper.make_graph(nodes, "toy", [images], made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    strings = Metadata(ABOUT, "limited" if score else "plain", shape, "float32-nchw").strings()
    helper.set_model_props(model, strings)
    onnx.save(model, path)
    return path


def released(folder: Path, shape: tuple[int, int, int] = SHAPE, weights: np.ndarray | None = None) -> Path:
    """A folder as a release makes it, with invented figures on its card."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_model(folder / MODEL, shape, weights=weights)
    write(Card.model_validate({
        "schema": "casemate-card/1", "file": MODEL, "sha256": file_sha256(path), "size": path.stat().st_size,
        "dataset": ABOUT.dataset, "classes": ABOUT.classes,
        "input": {"name": "image", "shape": shape, "layout": "float32-nchw"},
        "outputs": ("logits", "probabilities", "manifold_score"), "form": "limited", "variant": "float32",
        "threat": {"norm": ABOUT.norm, "radius": ABOUT.radius}, "clean": RATE,
        "robust": {"all": {**RATE, "accuracy": 0.5, "attacks": ["pgd"]}}, "verdict": "ok", "gate": None,
        "provenance": {"profile": "toy", "row": "toy", "mode": "limited", "method": "none", "network": "linear",
                       "data_checksum": "", "seed": None, "epochs": None, "budget": 1.0, "code_version": "0"},
    }), folder)  # fmt: skip
    return folder


class Server:
    """`casemate serve` in a process of its own, on a free port; `with` ends it and wants a clean end."""

    def __init__(self, model: Path | str, *options: str, folder: Path, command: str = "serve") -> None:
        self.log = folder / "server.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from casemate.cli import main; main()", command, str(model), "--port", "0",
                 *options],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.said = ""
        self.port = self._port(seconds=120)

    def _port(self, seconds: float) -> int:
        assert self.process.stdout is not None
        end, pipe = time.monotonic() + seconds, self.process.stdout.fileno()
        while time.monotonic() < end:
            if select.select([pipe], [], [], 0.2)[0]:
                part = os.read(pipe, 4096).decode()  # not by line: what a buffer holds, `select` does not see
                self.said += part
                found = re.search(r"http://127\.0\.0\.1:(\d+)\D", self.said)
                if found:
                    return int(found[1])
                if not part:
                    break
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.said}{self.log.read_text()}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # where its threads are, in the log
            self.process.wait()
            raise AssertionError(f"the server did not end: {self.log.read_text()}") from None
        finally:
            self.process.kill()
            self.process.wait()

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body) over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def infer(self, request: Any, name: str = "digits-row", **headers: str) -> tuple[int, Any]:
        """A JSON inference request: (status, answer)."""
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        status, _, answer = self.ask("POST", f"/v2/models/{name}/infer", body, headers)
        return status, json.loads(answer)


def request(images: np.ndarray) -> dict[str, Any]:
    """An inference request with JSON numbers."""
    return {"inputs": [{"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.tolist()}]}


def binary(images: np.ndarray, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of an inference request whose tensors, in and out, are binary."""
    content = images.astype("<f4").tobytes()
    told = {"inputs": [{"name": "image", "shape": list(images.shape), "datatype": "FP32",
                        "parameters": {"binary_data_size": len(content)}}],
            "parameters": {"binary_data_output": True}, **parameters}  # fmt: skip
    text = json.dumps(told).encode()
    return text + content, {"Inference-Header-Content-Length": str(len(text))}


def binary_answer(headers: dict[str, str], body: bytes) -> dict[str, np.ndarray]:
    """The outputs of an answer in binary, by name."""
    length = int(headers["inference-header-content-length"])
    found, at = {}, length
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(body[at : at + size], "<f4").reshape(output["shape"])
        at += size
    assert at == len(body)
    return found
