"""Model repositories: what Triton and MLServer would read, read here by the same grammar, and the files refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from typer.testing import CliRunner

from casemate.cli import app
from casemate.deploy import card as cards
from casemate.deploy.card import Card
from casemate.deploy.export import ExportOptions, export_system
from casemate.deploy.onnx_system import OnnxSystem
from casemate.deploy.repository import write_repository
from casemate.deploy.session import open_session
from casemate.errors import UserError
from tests.deploy_toys import ABOUT, SHAPE, imt_system
from tests.test_deploy_card import made as sample_card

FIELD = descriptor_pb2.FieldDescriptorProto
KINDS = {"string": FIELD.TYPE_STRING, "int32": FIELD.TYPE_INT32, "int64": FIELD.TYPE_INT64,
         "uint64": FIELD.TYPE_UINT64, "uint32": FIELD.TYPE_UINT32}  # fmt: skip
SCHEMA: dict[str, dict[str, str]] = {
    "ModelTensorReshape": {"shape": "repeated int64"},
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "repeated int64",
                   "reshape": "ModelTensorReshape"},
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "repeated int64",
                    "label_filename": "string", "reshape": "ModelTensorReshape"},
    "Latest": {"num_versions": "uint32"},
    "ModelVersionPolicy": {"latest": "Latest"},
    "ModelDynamicBatching": {"preferred_batch_size": "repeated int32", "max_queue_delay_microseconds": "uint64"},
    "ModelParameter": {"string_value": "string"},
    "ParametersEntry": {"key": "string", "value": "ModelParameter"},
    "ModelConfig": {
        "name": "string", "backend": "string", "max_batch_size": "int32", "input": "repeated ModelInput",
        "output": "repeated ModelOutput", "dynamic_batching": "ModelDynamicBatching",
        "version_policy": "ModelVersionPolicy", "parameters": "repeated ParametersEntry",
    },
}  # fmt: skip
"""The fields of Triton's model_config.proto that are used, with its types; any other is an error of the parser."""
TYPES = ("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
         "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING")  # fmt: skip


def parsed(text: str) -> Any:
    """A config.pbtxt as a message."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in enumerate(TYPES):
        kinds.value.add(name=name, number=number)
    for message, fields in SCHEMA.items():
        made = file.message_type.add(name=message)
        for number, (name, kind) in enumerate(fields.items(), start=1):
            repeated, _, kind = kind.rpartition(" ")
            field = made.field.add(name=name, number=number)
            field.label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
            if kind in KINDS:
                field.type = KINDS[kind]
            else:
                field.type = FIELD.TYPE_ENUM if kind == "DataType" else FIELD.TYPE_MESSAGE
                field.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return text_format.Parse(
        text, message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    )


def card_of(path: Path, **changes: Any) -> Card:
    file = OnnxSystem(path, "cpu")
    assert file.metadata is not None
    return sample_card(
        sha256=cards.file_sha256(path), size=path.stat().st_size, classes=file.metadata.about.classes,
        outputs=tuple(file.outputs), form=file.metadata.form, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder with a file that purifies, takes grey levels and offers everything."""
    folder = tmp_path_factory.mktemp("released") / "imt"
    options = ExportOptions(purified=True, layout="uint8-nhwc")
    export_system(imt_system(), folder / "model.onnx", ABOUT, options=options)
    cards.write(card_of(folder / "model.onnx"), folder)
    return folder


def test_triton_reads_what_the_file_takes_and_gives(released: Path, tmp_path: Path) -> None:
    (folder,) = write_repository([released], tmp_path, "triton", max_batch=16)
    assert folder.name == "quick-at_pgd-plain"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "1/model.onnx", "MODEL_CARD.md", "card.json", "config.pbtxt", "labels.txt",
    ]  # fmt: skip
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "onnxruntime", 16)
    session = open_session(folder / "1" / "model.onnx", "cpu")
    sides = ((config.input, session.get_inputs()), (config.output, session.get_outputs()))
    for said, true in sides:
        assert [tensor.name for tensor in said] == [value.name for value in true]
        for tensor, value in zip(said, true, strict=True):
            sizes = [] if tensor.HasField("reshape") else list(tensor.dims)
            assert sizes == value.shape[1:] and (list(tensor.dims) or [1]) == (value.shape[1:] or [1])
            assert (
                TYPES[tensor.data_type] == {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}[value.type]
            )
    labelled = [tensor.name for tensor in config.output if tensor.label_filename == "labels.txt"]
    assert labelled == ["logits", "probabilities"]
    assert (folder / "labels.txt").read_text().splitlines() == list("0123456789")
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert {p.key: p.value.string_value for p in config.parameters}["sha256"] == cards.verify(released).sha256


def test_the_parser_refuses_what_triton_would() -> None:
    for wrong in ("max_batch: 1", "input [ { data_type: TYPE_FLOAT } ]", "max_batch_size: many"):
        with pytest.raises(text_format.ParseError):
            parsed(wrong)


@pytest.mark.slow
def test_mlserver_serves_an_mlflow_model_that_answers_as_the_file(released: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["export-repository", str(released), "--out", str(tmp_path), "--engine", "mlserver", "--delay", "5"]
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "quick-at_pgd-plain"
    settings = json.loads((folder / "model-settings.json").read_text())
    assert settings["implementation"] == "mlserver_mlflow.MLflowRuntime"
    assert settings["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert settings["outputs"][2] == {"name": "manifold_score", "datatype": "FP32", "shape": [-1]}
    assert settings["max_batch_time"] == 0.005
    assert json.loads((tmp_path / "settings.json").read_text()) == {"host": "127.0.0.1", "parallel_workers": 0}
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str((folder / settings["parameters"]["uri"]).resolve()))
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    levels = (x * 255).round()
    answer = model.predict({"image": levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()})
    expected = OnnxSystem(released / "model.onnx", "cpu").run((levels / 255).numpy())
    np.testing.assert_allclose(answer["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_what_is_not_its_cards_file_or_failed_the_gate_is_not_put_up(released: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    content = (released / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content)
    good = card_of(copy / "model.onnx")
    assert good.gate is not None
    for gate in (None, good.gate.model_copy(update={"passed": False})):
        cards.write(card_of(copy / "model.onnx", gate=gate), copy)
        with pytest.raises(UserError, match="did not pass the release gate"):
            write_repository([copy], tmp_path / "out", "triton")
    cards.write(good, copy)
    with pytest.raises(UserError, match="two of the models are quick-at_pgd-plain"):
        write_repository([released, copy], tmp_path / "out", "triton")
    (copy / "model.onnx").write_bytes(content + b" ")
    with pytest.raises(UserError, match="was changed or exchanged"):
        write_repository([copy], tmp_path / "out", "triton")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_only_a_model_that_was_exported_before_is_replaced(released: Path, tmp_path: Path) -> None:
    (folder,) = write_repository([released], tmp_path, "triton", max_batch=16)
    (folder / "stale").touch()
    assert write_repository([released], tmp_path, "triton") == [folder] and not (folder / "stale").exists()
    for name in ("card.json", "config.pbtxt", "labels.txt", "MODEL_CARD.md", "1/model.onnx"):
        (folder / name).unlink()
    (folder / "thesis.tex").write_text("years of work")
    for card in (None, "{", "[]", '{"schema": "another"}'):
        if card is not None:
            (folder / "card.json").write_text(card)
        with pytest.raises(UserError, match="quick-at_pgd-plain exists and is no exported model") as caught:
            write_repository([released], tmp_path, "triton")
        assert "\n" not in str(caught.value) and (folder / "thesis.tex").exists()


def test_a_model_is_not_replaced_by_its_own_export(released: Path, tmp_path: Path) -> None:
    source = shutil.copytree(released, tmp_path / "quick-at_pgd-plain")
    with pytest.raises(UserError, match="is the model that is to be exported"):
        write_repository([source], tmp_path, "triton")
    assert (source / "model.onnx").exists()


def test_bad_requests_of_the_command(released: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["export-repository", str(released), "--out", str(tmp_path), "--engine", "torchserve"])
    assert done.exit_code == 2 and "known are triton and mlserver" in done.output
    done = run(app, ["export-repository", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert done.exit_code == 2 and "none does not exist" in done.output
    evil = card_of(released / "model.onnx").provenance.model_copy(update={"profile": "../up"})
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "model.onnx").write_bytes((released / "model.onnx").read_bytes())
    cards.write(card_of(tmp_path / "evil" / "model.onnx", provenance=evil), tmp_path / "evil")
    with pytest.raises(UserError, match="cannot be a model's name"):
        write_repository([tmp_path / "evil"], tmp_path / "out", "triton")
