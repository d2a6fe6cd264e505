"""`casemate.load`: by file, folder and registered name; a file that was changed is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import casemate
from casemate import model_registry, tracking
from casemate.deploy import card as cards
from casemate.deploy import runtime
from casemate.deploy.card import CARD, MODEL
from casemate.errors import UserError
from casemate.loading import STORE, resolve
from casemate.params import check_params
from casemate.serving.limits import Limits
from casemate.serving.pictures import Picture
from casemate.serving.service import Service
from casemate.threat import TOLERANCE
from pipeline.common import STATE, md5
from pipeline.profile import resolved
from tests.deploy_toys import ABOUT
from tests.serving_toys import SHAPE, released, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("load") / "champion")


IMAGES = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)


def test_a_file_and_its_folder_are_one_model(folder: Path) -> None:
    by_file, by_folder = casemate.load(folder / MODEL, "cpu"), casemate.load(str(folder), "cpu", threads=1)
    assert by_file.provider == by_folder.provider == "CPUExecutionProvider"
    assert by_file.card == by_folder.card and by_file.card is not None and by_file.card.threat.radius == ABOUT.radius
    np.testing.assert_array_equal(by_file.predict(IMAGES).logits, by_folder.predict(IMAGES).logits)


def test_a_file_that_was_changed_after_its_release_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / "changed")
    with (changed / MODEL).open("ab") as file:
        file.write(b"\x00")
    for path in (changed, changed / MODEL):
        with pytest.raises(UserError, match="changed or exchanged after its release") as caught:
            casemate.load(path, "cpu")
        assert "\n" not in str(caught.value)
    (changed / CARD).unlink()  # without a card there is nothing to hold it against
    assert casemate.load(shutil.copy(folder / MODEL, changed / "other.onnx"), "cpu").card is None


@pytest.mark.parametrize(
    "name", ["", "x", "x@", "@champion", "../../etc/x@y", "x/../1", "a/b/c", "x/-1", "x" * 10**6]
)
def test_references_that_name_no_model_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match="names no model") as caught:
        casemate.load(f"models:/{name}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_without_a_registry_the_mend_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"no registry in .*dvc repro"):
        casemate.load("models:/casemate-mnist@champion")
    assert list(tmp_path.iterdir()) == []


def test_it_looks_where_the_pipeline_keeps_its_registry_and_allows_what_an_attack_does() -> None:
    assert STORE == STATE / "mlflow" and runtime.TOLERANCE == TOLERANCE


def test_what_a_files_detector_flags(tmp_path: Path) -> None:
    model = casemate.load(write_model(tmp_path / "m.onnx", detector=True), "cpu")
    bright = np.stack([np.full(SHAPE, value, np.float32) for value in (0.4, 0.6)])
    found = model.predict(bright)
    assert found.rejected is not None and found.rejected.tolist() == [False, True]

    async def ask() -> list[bool | None]:
        service = Service(model, Limits(), name="m")
        async with service.open():
            answers = [await service.picture(Picture(image[None], (8, 8), ())) for image in bright]
        assert service.metrics.flagged._value.get() == 1
        return [answer.rejected for answer in answers]

    assert asyncio.run(ask()) == [False, True]


def test_a_path_needs_neither_torch_nor_mlflow(folder: Path) -> None:
    code = (
        f"import casemate, sys, numpy; model = casemate.load({str(folder)!r}); "
        f"model.predict(numpy.zeros({SHAPE}, 'f4')); assert not {{'torch', 'mlflow'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the registry -------------------------------------------------------------------------------------------


NAME = "casemate-smoke"


@pytest.fixture(scope="module")
def registry(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project's folder with a registry that the recorder filled: one version, the champion."""
    kept, home = Path.cwd(), tmp_path_factory.mktemp("project")
    os.chdir(home)
    try:
        params = check_params(resolved("smoke"))
        tags = {"dvc.out.md5": md5(folder / MODEL)}
        with tracking.stage_run(params, "export", "toy", STORE) as recorder:
            model_registry.register(recorder, folder / MODEL, example=IMAGES[:1], registered=NAME, tags=tags)
        experiment = params.tracking.experiment
        assert model_registry.set_champion(STORE, experiment, NAME, tags["dvc.out.md5"]) == "1"
        yield home
    finally:
        os.chdir(kept)


@pytest.mark.slow
def test_a_registered_model_by_alias_and_by_version(registry: Path, folder: Path) -> None:
    expected = casemate.load(folder, "cpu").predict(IMAGES).logits
    for reference in ("models:/casemate-smoke@champion", "models:/casemate-smoke/1"):
        np.testing.assert_array_equal(casemate.load(reference, "cpu").predict(IMAGES).logits, expected)
        found = resolve(reference)
        assert (found.registered, found.version) == ("casemate-smoke", "1")
    for gone in ("models:/casemate-smoke/2", "models:/casemate-smoke@best", "models:/other@champion"):
        with pytest.raises(UserError, match="registered models: casemate-smoke") as caught:
            casemate.load(gone)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_registered_model_tells_what_its_card_says(registry: Path, folder: Path) -> None:
    reference, experiment = f"models:/{NAME}/1", check_params(resolved("smoke")).tracking.experiment
    assert casemate.load(reference, "cpu").card is None, "nothing is told before the release"
    known = cards.verify(folder)

    def tell(text: str) -> None:
        tags = {model_registry.CARD: text}
        model_registry.describe(STORE, experiment, NAME, md5(folder / MODEL), tags, "released")

    try:
        tell(known.text())
        assert casemate.load(reference, "cpu").card == known
        served = Service.load(reference, Limits(), device="cpu")
        assert served.verified == "card" and served.about()["card"] == json.loads(known.text())
        tell(known.model_copy(update={"sha256": "0" * 64}).text())
        with pytest.raises(UserError, match="not the file that its card was written for"):
            casemate.load(reference, "cpu")
        tell("{}")
        with pytest.raises(UserError, match="the card of models:/casemate-smoke/1 is not a model card"):
            casemate.load(reference, "cpu")
    finally:
        tell(known.text())


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_not_replaced_by_the_local_registry(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"server http://127.0.0.1:{port} does not answer.*unset MLFLOW") as caught:
        casemate.load(f"models:/{NAME}@champion")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    for wrong in ("foo://x", "http://host:port", "http://[x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", wrong)
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI=") as caught:
            casemate.load(f"models:/{NAME}@champion")
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_registered_file_that_was_changed_is_refused(registry: Path) -> None:
    path = resolve("models:/casemate-smoke/1").path
    content = path.read_bytes()
    try:
        path.write_bytes(content + b"\x00")
        with pytest.raises(UserError, match="not the file that was registered"):
            casemate.load("models:/casemate-smoke@champion")
    finally:
        path.write_bytes(content)


@pytest.mark.full
def test_mlflow_serves_the_champion(registry: Path, folder: Path) -> None:
    """The command of docs/serving.md, and the answer of the file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "-h", "127.0.0.1",
               "-p", str(port), "--env-manager", "local", "--workers", "1"]  # fmt: skip
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{registry / STORE / 'mlflow.db'}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it looks for its server there
    }  # fmt: skip
    started = subprocess.Popen(command, env=environment, cwd=registry, start_new_session=True)
    try:
        body = json.dumps({"inputs": {"image": IMAGES.tolist()}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    told = json.load(answer)["predictions"]
                break
            except urllib.error.URLError:
                assert started.poll() is None and time.monotonic() < end, "mlflow does not answer"
                time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(30)
    expected = casemate.load(folder, "cpu").predict(IMAGES).logits
    np.testing.assert_allclose(np.float32(told["logits"]), expected, rtol=1e-4, atol=1e-4)
