"""What serving costs: `casemate serve` as a process of its own, against ONNX Runtime alone in this one.

    python benchmarks/serving.py [--model models/mnist/champion/model.onnx] [--parts latency throughput start memory]
                                 [--minutes 3] [--mlflow]

latency: one client, one image, binary tensors in and out over a kept connection, in turns with the bare session;
medians and quantiles of wall time. throughput: requests per second of one image each by 1 and by 32 connections
(one client process), in turns; the server's CPU time for each request, which a busy machine does not change; and
what batching can give at all, which is the bare session's images per second at batch 32 over batch 1. start: from
the command to the first answer, with --mlflow also of `mlflow models serve` from a registry made for the purpose.
memory: resident memory of the server under mixed load (JSON, binary of any batch size, pictures, bad requests) so
many minutes, the first third left out. Every part is written into benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from casemate.deploy.runtime import OnnxModel

OUT = Path("benchmarks/results/serving.json")
GOALS = {"added_ms": 5.0, "throughput_ratio": 3.0, "start_s": 10.0, "mlflow_start_s": 40.0}
CLIENTS = 32


# --- the server ---------------------------------------------------------------------------------------------


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server, once it listens."""
    code = "from casemate.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(model), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        yield int(line.partition("127.0.0.1:")[2].split()[0]), process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def infer_request(port: int, images: np.ndarray, *, binary: bool = True) -> bytes:
    """A whole HTTP request as bytes."""
    name = json.loads(get(port, "/"))["infer"]
    tensor: dict[str, Any] = {"name": "image", "shape": images.shape, "datatype": "FP32"}
    content = images.astype("<f4").tobytes() if binary else b""
    tensor |= {"parameters": {"binary_data_size": len(content)}} if binary else {"data": images.ravel().tolist()}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()
    length = f"Inference-Header-Content-Length: {len(text)}\r\n" if binary else ""
    head = f"POST {name} HTTP/1.1\r\nHost: x\r\n{length}Content-Length: {len(text) + len(content)}\r\n\r\n"
    return head.encode() + text + content


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """(status, body) of one request over a kept connection."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


# --- latency and throughput ---------------------------------------------------------------------------------


def latency(model: Path, rounds: int) -> dict[str, Any]:
    bare = OnnxModel(model, "cpu", threads=1)
    images = np.random.default_rng(0).random((1, *bare.input.shape), np.float32)
    names = [output.name for output in bare.per_image]
    alone, over = [], []
    with served(model) as (port, _):
        request = infer_request(port, images)
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(rounds + 50):
            began = time.perf_counter()
            bare.run_native(images, names)
            between = time.perf_counter()
            connection.sendall(request)
            status = whole_answer(connection)
            ended = time.perf_counter()
            assert status == 200
            if at >= 50:
                alone.append((between - began) * 1e3)
                over.append((ended - between) * 1e3)
        connection.close()
    found = {
        "rounds": rounds, "bare_ms": spread(alone), "served_ms": spread(over),
        "added_p50_ms": round(statistics.median(over) - statistics.median(alone), 3), "goal_ms": GOALS["added_ms"],
    }  # fmt: skip
    print(f"latency: bare {found['bare_ms']}, served {found['served_ms']}, added {found['added_p50_ms']} ms")
    return found


def whole_answer(connection: socket.socket) -> int:
    """The status of an answer, once all of it has come."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(1 << 16)
    head, _, body = found.partition(b"\r\n\r\n")
    left = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(connection.recv(1 << 16))
    return int(head.split(b" ", 2)[1])


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 3), "p90": round(cuts[89], 3), "p99": round(cuts[98], 3)}


async def load(port: int, request: bytes, clients: int, seconds: float) -> float:
    """Requests per second that so many connections get answered."""
    end, answered = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            status, _ = await exchange(reader, writer, request)
            assert status == 200
            answered += 1
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / (time.perf_counter() - began)


def throughput(model: Path, seconds: float, rounds: int) -> dict[str, Any]:
    bare = OnnxModel(model, "cpu", threads=1)
    images = np.random.default_rng(0).random((1, *bare.input.shape), np.float32)
    rates: dict[int, list[float]] = {1: [], CLIENTS: []}
    cpu: dict[int, list[float]] = {1: [], CLIENTS: []}
    with served(model) as (port, process):
        request = infer_request(port, images)
        asyncio.run(load(port, request, CLIENTS, 1))
        for _ in range(rounds):
            for clients in rates:
                before = cpu_seconds(process)
                rate = asyncio.run(load(port, request, clients, seconds))
                rates[clients].append(rate)
                cpu[clients].append((cpu_seconds(process) - before) / (rate * seconds) * 1e3)
        batches = metric(port, "casemate_batch_images_sum") / metric(port, "casemate_batch_images_count")
    one, many = (images_per_second(bare, n) for n in (1, CLIENTS))
    ratios = [b / a for a, b in zip(rates[1], rates[CLIENTS], strict=True)]
    found = {
        "rounds": rounds, "seconds": seconds, "mean_batch": round(batches, 1),
        "per_second": {str(c): round(statistics.median(r), 1) for c, r in rates.items()},
        "server_cpu_ms_each": {str(c): round(statistics.median(r), 3) for c, r in cpu.items()},
        "ratio": round(statistics.median(ratios), 2), "goal_ratio": GOALS["throughput_ratio"],
        "bare_cpu_ms_each": {"1": round(1e3 / one, 3), str(CLIENTS): round(1e3 / many, 3)},
        "bare_ratio": round(many / one, 2),
    }  # fmt: skip
    print(f"throughput: {found['per_second']} requests/s, {found['ratio']} x; bare batching {found['bare_ratio']} x; "
          f"server CPU {found['server_cpu_ms_each']} ms each")  # fmt: skip
    return found


def images_per_second(bare: OnnxModel, batch: int) -> float:
    """Of CPU time."""
    images = np.random.default_rng(0).random((batch, *bare.input.shape), np.float32)
    bare.run_native(images)
    began, count = time.thread_time(), 0
    while time.thread_time() - began < 1:
        bare.run_native(images)
        count += batch
    return count / (time.thread_time() - began)


def metric(port: int, name: str) -> float:
    lines = get(port, "/metrics").decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


# --- start --------------------------------------------------------------------------------------------------


def png(shape: tuple[int, int, int], side: int | None = None) -> bytes:
    levels = (np.random.default_rng(0).random(shape[1:]) * 255).astype(np.uint8)
    picture, out = Image.fromarray(levels), io.BytesIO()
    (picture if side is None else picture.resize((side, side))).save(out, "PNG")
    return out.getvalue()


def start(model: Path, repeats: int, with_mlflow: bool) -> dict[str, Any]:
    picture, taken = png(OnnxModel(model, "cpu").input.shape), []
    for _ in range(repeats):
        began = time.perf_counter()
        with served(model) as (port, _):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/predict", picture, {"Content-Type": "image/png"})
            assert connection.getresponse().status == 200
            taken.append(time.perf_counter() - began)
            connection.close()
    found: dict[str, Any] = {"repeats": repeats, "seconds": [round(t, 2) for t in taken], "goal": GOALS["start_s"]}
    if with_mlflow:
        found["mlflow_seconds"], found["mlflow_goal"] = mlflow_start(model), GOALS["mlflow_start_s"]
    print(f"start to first answer: {found}")
    return found


def mlflow_start(model: Path) -> float:
    """Of `mlflow models serve -m models:/NAME@champion`, from a registry that the project's recorder made."""
    from casemate import model_registry, tracking
    from casemate.params import check_params
    from pipeline.common import md5
    from pipeline.profile import resolved

    bare = OnnxModel(model, "cpu")
    example = np.zeros((1, *bare.input.native), np.uint8 if bare.input.uint8 else np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store, params, tags = Path(folder) / "mlflow", check_params(resolved("smoke")), {"dvc.out.md5": md5(model)}
        with tracking.stage_run(params, "export", "bench", store) as recorder:
            model_registry.register(recorder, model, example=example, registered="bench", tags=tags)
        assert model_registry.set_champion(store, params.tracking.experiment, "bench", tags["dvc.out.md5"]) == "1"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/bench@champion", "-p", str(port),
                   "-h", "127.0.0.1", "--env-manager", "local", "--workers", "1"]  # fmt: skip
        environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.local_uri(store)}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            body = json.dumps({"inputs": {bare.input.name: example.tolist()}})
            until(lambda: invoke(port, body), 120)
            return round(time.perf_counter() - began, 2)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def invoke(port: int, body: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        return answer.status == 200 and "logits" in told["predictions"]
    except (OSError, http.client.HTTPException):
        return False


def until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it does not answer"
        time.sleep(0.1)


# --- memory -------------------------------------------------------------------------------------------------


def memory(model: Path, minutes: float) -> dict[str, Any]:
    shape = OnnxModel(model, "cpu").input.shape
    rng = np.random.default_rng(0)
    with served(model) as (port, process):
        requests = [infer_request(port, rng.random((n, *shape), np.float32)) for n in (1, 2, 5, 16, 33, 64, 128, 256)]
        requests += [infer_request(port, rng.random((n, *shape), np.float32), binary=False) for n in (1, 7, 32)]
        requests += [infer_request(port, np.full((3, *shape), v, np.float32)) for v in (np.nan, 2.0)]
        requests += [picture_request(png(shape, side)) for side in (None, 100, 1500)]
        requests += [picture_request(png(shape, 300)[:500]), b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"]
        samples, statuses = asyncio.run(mixed(port, process, requests, minutes * 60))
    steady = [value for at, value in samples if at >= minutes * 20]
    half = len(steady) // 2
    first, second = statistics.median(steady[:half]), statistics.median(steady[half:])
    found = {
        "minutes": minutes, "requests": sum(statuses.values()), "statuses": statuses,
        "mib_start": round(samples[0][1], 1), "mib_first_half": round(first, 1), "mib_second_half": round(second, 1),
        "growth_mib": round(second - first, 1),
        "mib_most": round(max(value for _, value in samples), 1),
    }  # fmt: skip
    print(f"memory: {found}")
    return found


def picture_request(picture: bytes) -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(picture)}\r\n\r\n"
    return head.encode() + picture


async def mixed(
    port: int, process: int, requests: list[bytes], seconds: float
) -> tuple[list[tuple[float, float]], dict[int, int]]:
    """[(seconds, MiB)], and how often each status was answered, under four connections that take requests in turn."""
    began, samples, statuses = time.perf_counter(), [(0.0, resident_mib(process))], dict[int, int]()

    async def client(offset: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = offset
        while time.perf_counter() - began < seconds:
            status, _ = await exchange(reader, writer, requests[at % len(requests)])
            statuses[status] = statuses.get(status, 0) + 1
            at += 1
        writer.close()

    async def watch() -> None:
        while time.perf_counter() - began < seconds:
            await asyncio.sleep(1)
            samples.append((time.perf_counter() - began, resident_mib(process)))

    await asyncio.gather(watch(), *(client(4 * at) for at in range(4)))
    return samples, statuses


# --- all ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/mnist/champion/model.onnx"))
    parser.add_argument("--parts", nargs="+", choices=["latency", "throughput", "start", "memory"],
                        default=["latency", "throughput", "start", "memory"])  # fmt: skip
    parser.add_argument("--minutes", type=float, default=3, help="of mixed load, for memory")
    parser.add_argument("--mlflow", action="store_true", help="time `mlflow models serve` as well")
    options = parser.parse_args()
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "latency": lambda: latency(options.model, 1000), "throughput": lambda: throughput(options.model, 3, 5),
        "start": lambda: start(options.model, 5, options.mlflow),
        "memory": lambda: memory(options.model, options.minutes),
    }  # fmt: skip
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    name = str(options.model)
    for part in options.parts:
        conditions = {
            "machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__, "model_threads": 1, "load_at_start": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        results.setdefault(name, {})[part] = {"conditions": conditions, **run[part]()}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        temporary = OUT.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(OUT)


if __name__ == "__main__":
    main()
