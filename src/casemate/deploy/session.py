"""ONNX Runtime sessions: the provider chosen on purpose and checked, no spurious warnings."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, Literal

from casemate.errors import UserError, first_line

Device = Literal["auto", "cpu", "cuda"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
QUIET = 4  # fatal errors only


def open_session(model: Path | bytes, device: Device = "auto", *, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU or on a GPU.

    device: "cuda" raises UserError where the runtime cannot use a GPU; "auto" takes one if the driver has one and the
      runtime can use it, else the CPU. What runs is `session.get_providers()[0]`.
    threads: of the CPU; by default PyTorch's own number, or what it would be.
    Raises UserError if the file does not exist or is not a model that the runtime can run.
    """
    import onnxruntime as ort

    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{model} does not exist")
    name = str(model) if isinstance(model, Path) else "the model"
    wanted = device == "cuda" or (device == "auto" and gpu_present())
    if wanted and CUDA not in ort.get_available_providers():
        if device == "cuda":
            raise UserError("this onnxruntime has no CUDA provider: install onnxruntime-gpu, or ask for the CPU")
        wanted = False
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = QUIET
    # The default logger speaks before a session's own options count: of missing CUDA libraries, though it falls back.
    ort.set_default_logger_severity(QUIET)
    if wanted:
        ort.preload_dlls(directory="")  # from the nvidia packages beside this Python
    # TF32 would cost the parity that the file was exported with
    providers: list[Any] = [(CUDA, {"use_tf32": "0"}), CPU] if wanted else [CPU]
    source = str(model) if isinstance(model, Path) else model
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # the runtime's exceptions share no base but this
        raise UserError(f"{name} is not an ONNX model that can be run: {first_line(error)}") from None
    if device == "cuda" and session.get_providers()[0] != CUDA:
        raise UserError("a GPU is asked for and onnxruntime cannot use one here; ask for the CPU")
    return session


def gpu_present() -> bool:
    """Whether NVIDIA's driver has a GPU for this process; asked of the driver, as PyTorch takes seconds to load."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        found = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0 and found.value > 0
    except (OSError, AttributeError):
        return False


def default_threads() -> int:
    """PyTorch's number where it is loaded, else OMP_NUM_THREADS, else the cores that this process may use."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdigit() and int(asked) > 0 else cores
