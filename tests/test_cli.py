"""The command line: lists, a user's own models, and one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_toys import trained_network
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from casemate import registry
from casemate.cli import app, describe
from casemate.data import Loaded

Invoke = Callable[..., Result]
MODEL = """
import torch
from torch import nn
from casemate.networks.base import build_network

net = build_network("digits_cnn", input_shape=(1, 8, 8), num_classes=10)
net.load_state_dict(torch.load("WEIGHTS", weights_only=True))
net.eval()

def function(x):
    return net(x)

def factory():
    return net

def scores_only(x):
    return net(x).detach().numpy()

def noisy(x):
    return net(x) + torch.randn(len(x), 10)

def saturated(x):
    return net(x) * 1e4

def labels(x):
    return net(x).argmax(1)

def optimising(x):
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf).logsumexp(1).sum(), leaf)
    return net((x + 0.01 * gradient.sign()).clamp(0, 1))

def failing(x):
    return net(x[:, :, :4])

class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

number = 3
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, a model file, and the data."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.save(trained_network().state_dict(), folder / "weights.pt")
    (folder / "own_models.py").write_text(MODEL.replace("WEIGHTS", str(folder / "weights.pt")))
    return folder


@pytest.fixture
def invoke(workshop: Path, raw: Path, tmp_path: Path) -> Invoke:
    """`casemate evaluate MODEL ...` on digits, with a ledger of the test's own."""

    def call(model: str, *arguments: str, data: str = "digits", images: int = 60) -> Result:
        given = [
            "evaluate", model.replace("own:", f"{workshop}/own_models.py:"), "--data", data, "--radius", "0.1",
            "--images", str(images), "--ledger", str(tmp_path / "ledger"), "--data-root", str(raw),
            "--out", str(tmp_path / "report.json"), "--device", "cpu", *arguments,
        ]  # fmt: skip
        return CliRunner().invoke(app, given, env={"COLUMNS": "140"})

    return call


QUICK = ("--attacks", "pgd:steps=5,fgsm", "--no-gate")


def report(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return found


# --- list and version ---------------------------------------------------------------------------------------


def test_list_names_everything_without_torch() -> None:
    code = "import sys; from casemate.cli import app\ntry: app(['list'])\nexcept SystemExit as e: assert not e.code\n"
    code += "assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for kind in ("attack", "defense", "detector", "network", "dataset"):
        assert all(name in done.stdout for name in registry.names(kind))


def test_list_of_one_kind() -> None:
    result = CliRunner().invoke(app, ["list", "attacks"])
    assert "pgd" in result.stdout and "trades" not in result.stdout
    wrong = CliRunner().invoke(app, ["list", "atack"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: no kind 'atack'; did you mean 'attacks'")


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in registry.TABLES for n in registry.names(k)])
def test_every_registered_class_has_a_line(kind: str, name: str) -> None:
    line = describe(kind, name)
    assert len(line) > 15 and "\n" not in line


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("casemate ")


# --- own models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["function", "factory", "net", "Made"])
def test_every_form_of_a_callable_gives_one_result(invoke: Invoke, tmp_path: Path, form: str) -> None:
    result = invoke(f"own:{form}", *QUICK)
    assert result.exit_code == 0, result.output
    entry = report(tmp_path)["systems"][0]
    assert [(c["attack"], c["n"]) for c in entry["cells"]] == [("pgd", 60), ("fgsm", 60)]
    assert entry["clean"]["accuracy"] > 0.9 > entry["worst"]["all"]["adaptive"]["accuracy"] > 0.2
    assert entry["cells"][0]["spec"]["steps"] == 5


def test_the_cost_comes_before_the_table_and_nothing_is_done_twice(invoke: Invoke) -> None:
    first, second = invoke("own:net", *QUICK), invoke("own:net", *QUICK)
    lines = first.stdout.splitlines()
    assert lines[0].startswith("own_models.py:net: 2 cells, 120 images to attack, at most 360 forwards")
    assert "worst case" in first.stdout and "95 % interval" in first.stdout
    assert "nothing to compute" in second.stdout.splitlines()[0]


def test_the_gate_speaks_up_about_masked_gradients(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("own:saturated", "--attacks", "pgd:steps=5")
    assert result.exit_code == 0 and "FAILED gradients are not zero" in result.stdout
    found = report(tmp_path)
    assert found["systems"][0]["gate"]["verdict"] == "unreliable"
    assert any("not robustness" in caution for caution in found["cautions"])
    assert "not robustness" in " ".join(result.stdout.split())


def test_a_model_without_gradient_is_never_called_robust(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("own:scores_only", "--attacks", "pgd")
    assert result.exit_code == 0, result.output
    assert "pgd is left out: it needs gradient" in result.stdout
    found = report(tmp_path)
    assert [c["attack"] for c in found["systems"][0]["cells"]] == ["corners"]
    assert "upper bound" in found["cautions"][0] and "upper bound" in " ".join(result.stdout.split())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_a_known_network(invoke: Invoke, tmp_path: Path, suffix: str) -> None:
    state = {f"module.{k}": v for k, v in trained_network().state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    result = invoke(str(path), "--network", "digits_cnn", *QUICK)
    assert result.exit_code == 0, result.output
    assert report(tmp_path)["systems"][0]["clean"]["accuracy"] > 0.9


def test_a_folder_of_pictures(invoke: Invoke, digits: Loaded, tmp_path: Path) -> None:
    for i in range(30):
        folder = tmp_path / "pictures" / str(digits.test.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.test.images[i, :, :, 0]).save(folder / f"{i}.png")
    for name in "0123456789":
        (tmp_path / "pictures" / name).mkdir(exist_ok=True)
    where = str(tmp_path / "pictures")
    needs_shape = invoke("own:net", *QUICK, data=where)
    assert needs_shape.exit_code == 2 and "--shape C,H,W" in needs_shape.stderr
    result = invoke("own:net", *QUICK, "--shape", "1,8,8", data=where)
    assert result.exit_code == 0, result.output
    assert report(tmp_path)["systems"][0]["clean"]["n"] == 30


def test_a_trained_row_and_a_transfer_from_it(invoke: Invoke, tmp_path: Path) -> None:
    folder = trained_row(tmp_path / "standard")
    result = invoke(str(folder), "--source", str(folder), "--attacks", "transfer:steps=5", "--no-gate")
    assert result.exit_code == 0, result.output
    found = report(tmp_path)
    assert found["network"] == "digits_cnn" and found["row"] == "standard"
    assert found["systems"][0]["cells"][0]["accuracy"] < 0.9
    assert found["card"]["seed"] == 0


def test_an_onnx_file_meets_black_boxes_only(invoke: Invoke, tmp_path: Path) -> None:
    from casemate.deploy.export import export_system
    from casemate.deploy.metadata import About
    from casemate.system import TorchSystem

    path = tmp_path / "model.onnx"
    system = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    export_system(system, path, About("digits", tuple("0123456789"), "linf", 0.1))
    source = trained_row(tmp_path / "standard")
    result = invoke(str(path), "--source", str(source), "--attacks", "pgd,transfer:steps=5")
    assert result.exit_code == 0, result.output
    assert "pgd is left out: it needs gradient; this model offers labels and scores" in result.stdout
    found = report(tmp_path)
    entry = found["systems"][0]
    assert [c["attack"] for c in entry["cells"]] == ["transfer", "corners"]
    assert all(c["backwards"] >= 0 for c in entry["cells"])
    assert entry["worst"]["all"]["adaptive"]["accuracy"] < entry["clean"]["accuracy"]
    assert found["cautions"] and "upper bound" in found["cautions"][0] and entry["gate"]["verdict"] == "not run"


def trained_row(folder: Path) -> Path:
    from casemate.training.artifact import save_artifact

    card = {
        "schema": 1, "dataset": "digits", "classes": list("0123456789"), "input_shape": [1, 8, 8],
        "network": {"name": "digits_cnn", "options": {}, "normalise": None},
        "defense": {"method": "standard", "options": {}}, "recipe": {"epochs": 5, "lr": 0.003},
        "threat": {"norm": "linf", "radius": 0.1}, "seed": 0, "effective_epochs": 5.0,
    }  # fmt: skip
    save_artifact(folder, {"classifier": trained_network()}, card)
    return folder


def test_ctrl_c_keeps_what_is_done(workshop: Path, raw: Path, tmp_path: Path) -> None:
    slow = MODEL.replace("WEIGHTS", str(workshop / "weights.pt")).replace(
        "def function(x):\n", "import time\n\ndef function(x):\n    time.sleep(0.1 * (len(x) > 8))\n"
    )
    (tmp_path / "slow.py").write_text(slow)
    ledger = tmp_path / "ledger"
    command = [
        sys.executable, "-c", "from casemate.cli import main; main()", "evaluate", f"{tmp_path}/slow.py:function",
        "--data", "digits", "--images", "500", "--chunk", "10", "--attacks", "pgd:steps=2", "--radius", "0.1",
        "--no-gate", "--ledger", str(ledger), "--data-root", str(raw), "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(ledger.rglob("*.parquet"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        stderr == f"error: interrupted; finished chunks are kept in {ledger}: run the same command again to go on\n"
    )
    assert len(list(ledger.rglob("*.parquet"))) >= 2


# --- mistakes -----------------------------------------------------------------------------------------------

MISTAKES = {
    "no model": (["nothing"], {}, "nothing is no model: give file.py:callable"),
    "no file": (["gone.py:net"], {}, "gone.py does not exist"),
    "no module": (["no_such_package:net"], {}, "no_such_package cannot be imported: ModuleNotFoundError"),
    "no name": (["own:nets"], {}, "has no 'nets'; did you mean 'net'"),
    "not callable": (["own:number"], {}, "is int, not a model"),
    "labels": (["own:labels"], {}, "must answer images (8, 1, 8, 8) with logits of shape (8, classes)"),
    "failing": (["own:failing"], {}, "failed on images of shape (8, 1, 8, 8) in [0, 1]: "),
    "noisy": (["own:noisy"], {}, "answers the same images differently each time"),
    "optimising": (["own:optimising"], {}, "takes gradients in its forward pass: it optimises at test time"),
    "no dataset": (["own:net"], {"data": "digts"}, "--data digts: no such dataset or folder; did you mean 'digits'?"),
    "no attack": (["own:net", "--attacks", "pdg"], {}, "unknown attack 'pdg'; did you mean 'pgd'"),
    "no option": (["own:net", "--attacks", "pgd:step=3"], {}, "attack pgd has no option 'step'; did you mean"),
    "bad value": (["own:net", "--attacks", "pgd:steps=0"], {}, "attack pgd: steps: Input should be greater"),
    "no pair": (["own:net", "--attacks", "pgd:steps"], {}, "attack pgd: 'steps' is not key=value"),
    "norm": (["own:net", "--norm", "l3"], {}, "--norm l3: known are linf and l2"),
    "radius": (["own:net", "--radius", "8/0"], {}, "--radius: '8/0' is not a number or a fraction such as 8/255"),
    "zero radius": (["own:net", "--radius", "0"], {}, "--radius 0: must be above 0"),
    "radius of grey levels": (["own:net", "--radius", "8"], {}, "did you mean 8/255?"),
    "no source": (["own:net", "--attacks", "transfer"], {}, "attack transfer needs --source"),
    "weights": (["own:net", "--attacks", "gap"], {}, "attack 'gap' needs its weights"),
    "no network": (["weights.pt"], {}, "weights.pt: name the network it is of with --network"),
    "bad network": (["weights.pt", "--network", "lenet"], {}, "unknown network 'lenet'; did you mean 'lenet5'"),
    "no checkpoint": (["gone.pt", "--network", "digits_cnn"], {}, "gone.pt does not exist"),
    "shape": (["own:net", "--shape", "8,8"], {}, "--shape 8,8: give channels, height and width"),
    "no onnx": (["gone.onnx"], {}, "gone.onnx does not exist"),
    "gpu": (["own:net", "--device", "tpu"], {}, "--device tpu: known are auto, cpu and cuda"),
    "out": (["own:net", "--out", "no/such/folder/r.json"], {}, "--out no/such/folder/r.json: the folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(invoke: Invoke, mistake: str) -> None:
    arguments, options, message = MISTAKES[mistake]
    result = invoke(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output


def test_a_file_of_another_network_or_of_code_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    other, code = tmp_path / "other.pt", tmp_path / "code.pt"
    torch.save({"conv.weight": torch.zeros(3)}, other)
    torch.save(trained_network(), code)
    wrong = invoke(str(other), "--network", "digits_cnn")
    assert wrong.exit_code == 2 and "its first is 'conv.weight'" in wrong.stderr
    refused = invoke(str(code), "--network", "digits_cnn")
    assert refused.exit_code == 2 and "torch.save(model.state_dict(), ...)" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_absent_gpu_is_said(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("own:net", "--device", "cuda")
    assert result.exit_code == 2 and "no usable GPU" in result.stderr
