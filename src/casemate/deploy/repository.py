"""Released files as other servers want them: a Triton model repository, an MLServer one.

Every file is checked against its card first. Batching is left to the servers: the files take any batch size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from casemate.deploy import card as cards
from casemate.deploy.card import CARD, MODEL, SCHEMA, TEXT, Card
from casemate.deploy.runtime import OnnxModel
from casemate.errors import UserError

Engine = Literal["triton", "mlserver"]
SaveModel = Callable[[Path, Path], None]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
LABELS, SETTINGS = "labels.txt", "settings.json"
TRITON_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64"}
V2_TYPES = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}


def model_name(card: Card) -> str:
    """The name that servers give the model: profile, row, mode and what was made of it."""
    p = card.provenance
    parts = [p.profile, p.row, p.mode, *([] if card.variant == "float32" else [card.variant])]
    return "-".join(parts)


def write_repository(
    models: Sequence[Path], out: Path, engine: Engine, *, max_batch: int = 64, delay_ms: float = 2.0,
    save_model: SaveModel | None = None,
) -> list[Path]:  # fmt: skip
    """Write a model repository for `engine` into the folder `out`; returns the folder of each model in it.

    models: released folders or the files in them. max_batch: images that the server may put together, and
    `delay_ms` how long it may wait for them. save_model(file, folder): writes an MLflow model, which MLServer loads.
    A model of ours that is there already is replaced, another folder of its name never. MLServer gets a
    `settings.json` where there is none: loopback, and the models in its own process. Raises UserError for a file that
    is not its card's or did not pass the release gate, where two models share a name, or another folder has it.
    """
    checked = [(cards.model_path(model), cards.verify(model)) for model in models]
    names = [model_name(card) for _, card in checked]
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot be a model's name: letters, digits and _ . + - are")
        if names.count(name) > 1:
            raise UserError(f"two of the models are {name}: give each file once")
    for name, (path, _) in zip(names, checked, strict=True):
        _replaceable(out / name, path)
    made = []
    for name, (path, card) in zip(names, checked, strict=True):
        if card.gate is None or not card.gate.passed:
            raise UserError(f"{path} did not pass the release gate, as {path.with_name(CARD)} says: it is not served")
        folder, making = out / name, out / f".{name}.tmp"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        if engine == "triton":
            _triton(making, name, path, card, max_batch, delay_ms)
        else:
            _mlserver(making, name, path, card, max_batch, delay_ms, save_model)
        for beside in (CARD, TEXT):
            if path.with_name(beside).is_file():
                shutil.copyfile(path.with_name(beside), making / beside)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
        made.append(folder)
    if engine == "mlserver" and not (out / SETTINGS).exists():
        (out / SETTINGS).write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0}, indent=1) + "\n")
    return made


def _replaceable(folder: Path, source: Path) -> None:
    """Raise UserError unless nothing is at `folder`, or a model that was exported before: it has a card of ours."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.resolve() == source.parent.resolve():
        raise UserError(f"{folder} is the model that is to be exported; give another --out")
    try:
        schema = json.loads((folder / CARD).read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        schema = None
    if folder.is_symlink() or not str(schema).startswith(SCHEMA.partition("/")[0] + "/"):
        raise UserError(
            f"{folder} exists and is no exported model (it has no {CARD} of ours); move it or give another --out"
        )


# --- Triton ---------------------------------------------------------------------------------------------------


def _triton(folder: Path, name: str, path: Path, card: Card, max_batch: int, delay_ms: float) -> None:
    (folder / "1").mkdir()
    shutil.copyfile(path, folder / "1" / MODEL)
    (folder / LABELS).write_text("".join(f"{label}\n" for label in card.classes), encoding="utf-8")
    (folder / "config.pbtxt").write_text(triton_config(name, path, card, max_batch, delay_ms), encoding="utf-8")


def triton_config(name: str, path: Path, card: Card, max_batch: int, delay_ms: float) -> str:
    """`config.pbtxt`: protobuf text of Triton's ModelConfig. Sizes leave the batch out, as it wants them."""
    session = OnnxModel(path, "cpu").session
    inputs = [_tensor(value) for value in session.get_inputs()]
    outputs = [_tensor(value, card) for value in session.get_outputs()]
    preferred = [size for size in (8, 32, max_batch) if size <= max_batch]
    return f"""name: {_text(name)}
backend: "onnxruntime"
max_batch_size: {max_batch}
input [
{_join(inputs)}
]
output [
{_join(outputs)}
]
dynamic_batching {{
  preferred_batch_size: [ {", ".join(map(str, sorted(set(preferred))))} ]
  max_queue_delay_microseconds: {round(1000 * delay_ms)}
}}
version_policy {{ latest {{ num_versions: 1 }} }}
parameters [
  {{ key: "sha256" value {{ string_value: {_text(card.sha256)} }} }},
  {{ key: "threat" value {{ string_value: {_text(f"{card.threat.norm} {card.threat.radius:g}")} }} }}
]
"""


def _tensor(value: Any, card: Card | None = None) -> str:
    sizes = [int(size) for size in value.shape[1:]]
    lines = [f"name: {_text(value.name)}", f"data_type: {TRITON_TYPES[value.type]}"]
    lines.append(f"dims: [ {', '.join(map(str, sizes or [1]))} ]")
    if not sizes:  # one number for each image: Triton has no dims of length 0
        lines.append("reshape { shape: [ ] }")
    if card is not None and sizes == [len(card.classes)]:
        lines.append(f"label_filename: {_text(LABELS)}")
    return "  {\n" + "".join(f"    {line}\n" for line in lines) + "  }"


def _join(parts: list[str]) -> str:
    return ",\n".join(parts)


def _text(value: str) -> str:
    """A protobuf text string; JSON's escapes are a part of its own."""
    return json.dumps(value)


# --- MLServer -------------------------------------------------------------------------------------------------


def _mlserver(
    folder: Path, name: str, path: Path, card: Card, max_batch: int, delay_ms: float, save_model: SaveModel | None
) -> None:
    if save_model is None:
        raise UserError("an MLServer repository holds MLflow models: install the extra 'pipeline'")
    save_model(path, folder / "model")
    settings = mlserver_settings(name, path, card, max_batch, delay_ms)
    (folder / "model-settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def mlserver_settings(name: str, path: Path, card: Card, max_batch: int, delay_ms: float) -> dict[str, Any]:
    """`model-settings.json`: the MLflow runtime on the model beside it, with the V2 protocol's tensors."""
    session = OnnxModel(path, "cpu").session

    def tensors(values: Any) -> list[dict[str, Any]]:
        return [
            {"name": value.name, "datatype": V2_TYPES[value.type], "shape": [-1, *map(int, value.shape[1:])]}
            for value in values
        ]

    return {
        "name": name, "platform": "onnx", "implementation": "mlserver_mlflow.MLflowRuntime",
        "inputs": tensors(session.get_inputs()), "outputs": tensors(session.get_outputs()),
        "max_batch_size": max_batch, "max_batch_time": delay_ms / 1000,
        "parameters": {
            "uri": "./model", "version": "1",
            "extra": {"sha256": card.sha256, "threat": f"{card.threat.norm} {card.threat.radius:g}"},
        },
    }  # fmt: skip
