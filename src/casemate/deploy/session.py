"""ONNX Runtime sessions: the provider chosen on purpose and checked, no spurious warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from casemate.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
QUIET = 4  # fatal errors only


def open_session(model: Path | bytes, device: Device = "auto", *, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU or on a GPU.

    device: "cuda" raises UserError where the runtime cannot use a GPU; "auto" takes one if PyTorch sees one and the
      runtime can use it, else the CPU. What runs is `session.get_providers()[0]`.
    threads: of the CPU; by default PyTorch's own number.
    Raises UserError if the file does not exist or is not a model that the runtime can run.
    """
    import onnxruntime as ort
    import torch

    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{model} does not exist")
    name = str(model) if isinstance(model, Path) else "the model"
    wanted = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if wanted and CUDA not in ort.get_available_providers():
        if device == "cuda":
            raise UserError("this onnxruntime has no CUDA provider: install onnxruntime-gpu, or ask for the CPU")
        wanted = False
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
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


def first_line(error: Exception) -> str:
    """The start of an error of the runtime, whose messages can be pages long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
