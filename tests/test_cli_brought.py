"""What a user brings: released folders, folders of other classes, and options that would change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from attack_toys import trained_network
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from casemate.cli import app
from casemate.deploy import card as cards
from casemate.deploy.export import export_system
from casemate.deploy.metadata import About
from casemate.errors import UserError
from casemate.evaluation.bring import load_source
from casemate.system import TorchSystem
from tests.test_deploy_card import made as sample_card

CODE = """
import torch
from torch import nn

net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "brought_model.py").write_text(CODE)
    return f"{tmp_path}/brought_model.py:net"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    folder = tmp_path / "champion"
    folder.mkdir()
    system = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    model = folder / "model.onnx"
    export_system(system, model, About("digits", tuple("0123456789"), "linf", 0.1))
    cards.write(sample_card(sha256=cards.file_sha256(model), size=model.stat().st_size), folder)
    return folder


def invoke(raw: Path, tmp_path: Path, model: str, *arguments: str, data: str = "digits") -> Result:
    given = [
        "evaluate", model, "--data", data, "--radius", "0.1", "--images", "20", "--no-gate", "--device", "cpu",
        "--ledger", str(tmp_path / "ledger"), "--data-root", str(raw), *arguments,
    ]  # fmt: skip
    return CliRunner().invoke(app, given, env={"COLUMNS": "140"})


def pictures(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), 100).save(folder / name / "a.png")
    return str(folder)


def test_a_released_folder_is_attacked_by_its_file(released: Path, raw: Path, tmp_path: Path) -> None:
    done = invoke(raw, tmp_path, str(released), "--attacks", "pgd")
    assert done.exit_code == 0, done.output
    assert "champion: pgd is left out: it needs gradient" in done.stdout and "corners" in done.stdout
    with pytest.raises(UserError, match=r"a released folder, .* give models/PROFILE/trained/ROW"):
        load_source(released, "cpu")


def test_a_released_file_that_was_exchanged_is_refused(released: Path, raw: Path, tmp_path: Path) -> None:
    """Figures under a released name must be of the file that was released."""
    with (released / "model.onnx").open("ab") as file:
        file.write(b"\0")
    refused = invoke(raw, tmp_path, str(released), "--attacks", "square")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
    assert "is not the file that" in refused.stderr and "changed or exchanged" in refused.stderr


def test_classes_that_fit_by_chance_are_refused(own: str, released: Path, raw: Path, tmp_path: Path) -> None:
    """A folder "3" would be label 0 of a model that says nothing of its classes."""
    data = pictures(tmp_path / "pictures", "3", "5")
    refused = invoke(raw, tmp_path, own, "--shape", "1,8,8", "--attacks", "fgsm", data=data)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "tells 10 classes apart and" in refused.stderr and "has 2 (3, 5): " in refused.stderr
    assert "an empty sub-folder" in refused.stderr
    known = invoke(raw, tmp_path, str(released), "--attacks", "pgd", data=data)  # its names map
    assert known.exit_code == 0, known.output


MISTAKES = {
    "network": (["--network", "lenet5"], "--network is for a checkpoint"),
    "network option": (["--network-option", "depth=3"], "--network-option is for a checkpoint"),
    "normalise": (["--normalise"], "--normalise is for a checkpoint"),
    "shape": (["--shape", "1,8,8"], "--shape: dataset digits says the shape itself"),
    "attacks": (["--attacks", "joint"], "--attacks: none of them can be run on this model (joint needs detector)"),
    "weights": (["--attacks", "gap"], "it is fitted by the finetune stage: put it in a suite of params.yaml"),
    "empty out": (["--out", ""], "--out .: is a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(own: str, raw: Path, tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    result = invoke(raw, tmp_path, own, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1 and not result.stdout


def test_the_shape_of_a_file_that_says_it_is_refused(released: Path, raw: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures", "3")
    result = invoke(raw, tmp_path, str(released), "--shape", "1,8,8", data=data)
    assert result.exit_code == 2 and "model says" not in result.stderr and "says the shape itself" in result.stderr


@pytest.mark.parametrize(
    ("network", "option", "message"),
    [
        ("wrn", "depht=3", "network wrn has no option 'depht'; did you mean 'depth'?"),
        ("wrn", "depth=x", "network wrn: depth: Input should be a valid integer"),
        ("digits_cnn", "depth=3", "network digits_cnn has no option 'depth'; it has none"),
    ],
)
def test_a_wrong_option_of_a_network_is_one_line(
    raw: Path, tmp_path: Path, network: str, option: str, message: str
) -> None:
    torch.save(trained_network().state_dict(), tmp_path / "weights.pt")
    path = str(tmp_path / "weights.pt")
    result = invoke(raw, tmp_path, path, "--network", network, "--network-option", option)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_ledger_that_is_a_file_is_said(own: str, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke(raw, tmp_path, own, "--ledger", str(tmp_path / "file"))
    assert result.exit_code == 2 and "file is a file; give a folder" in result.stderr


def test_distances_look_at_their_output_first(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    call = ["distances", str(tmp_path / "x.npy"), "--protocol", "digits"]
    wrong = CliRunner().invoke(app, [*call, "--out", str(tmp_path)])
    assert wrong.exit_code == 2 and "is a folder" in wrong.stderr
    for name in ("x.npy", "empty.npz"):
        bare = CliRunner().invoke(app, ["distances", str(tmp_path / name), "--protocol", "digits"])
        assert bare.exit_code == 2 and "is not an adversarial.npz of the evaluate stage" in bare.stderr
