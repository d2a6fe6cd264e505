"""The page: what is attacked and how, and the whole of it in a real browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from casemate.data import Loaded
from casemate.errors import UserError
from casemate.networks.base import build_network
from casemate.serving.demo.attack import attack_image, procedures
from casemate.serving.demo.contenders import find_contenders
from casemate.serving.demo.samples import Samples
from casemate.system import TorchSystem
from tests.deploy_toys import ABOUT, imt_system
from tests.serving_toys import SHAPE, Server, released, write_model
from tests.test_serving import GREY, encoded

if TYPE_CHECKING:
    from playwright.sync_api import Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
IMAGE = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def models(digits: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile's folder with files only: a standard row and a champion, both the least-squares fit to the digits."""
    pixels = digits.train.images.reshape(len(digits.train), -1).astype(np.float32) / 255
    fit = np.linalg.lstsq(pixels, np.eye(10)[digits.train.labels], rcond=None)[0]
    weights = (8 * fit).astype(np.float32)
    folder = tmp_path_factory.mktemp("models")
    (folder / "exported" / "standard").mkdir(parents=True)
    write_model(folder / "exported" / "standard" / "plain.onnx", score=False, weights=weights)
    released(folder / "champion", weights=weights)
    (folder / "champion" / "champion.json").write_text(json.dumps({"row": "hardened", "mode": "limited"}))
    return folder


# --- who stands against whom --------------------------------------------------------------------------------


def test_the_standard_row_stands_against_the_champion(models: Path, tmp_path: Path) -> None:
    standard, robust = find_contenders(models)
    assert (standard.title, standard.row, robust.title, robust.row) == ("Standard", "standard", "Robust", "hardened")
    assert robust.tested is not None and robust.tested.robust == 0.5 and robust.trained is None
    reading = robust.read(IMAGE)
    expected = robust.predictor.predict(IMAGE)
    assert (
        reading.label == expected.labels[0] and reading.top[0][0] == expected.names[0] and reading.score is not None
    )
    assert len(reading.top) == 3 and standard.read(IMAGE).score is None
    only = tmp_path / "only"
    shutil.copytree(models / "champion", only / "champion")
    assert [contender.title for contender in find_contenders(only)] == ["Robust"]
    with pytest.raises(UserError, match="no exported model; 'dvc repro' makes them"):
        find_contenders(tmp_path / "none")
    with pytest.raises(UserError, match=r"no exported row 'standart'.*did you mean 'standard'"):
        find_contenders(models, "standart")


def test_a_changed_champion_is_not_shown(models: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(models, tmp_path / "models")
    with (copied / "champion" / "model.onnx").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(UserError, match="changed or exchanged"):
        find_contenders(copied)


# --- how they are attacked ----------------------------------------------------------------------------------


def test_files_alone_are_attacked_by_their_answers(models: Path) -> None:
    for contender in find_contenders(models):
        label = contender.read(IMAGE).label
        found = attack_image(contender.victim(), IMAGE, label, "linf", 0.3, queries=200)
        assert not found.white_box and found.tried == ("Square",) and found.success
        assert contender.read(found.image).label != label
        assert np.abs(found.image - IMAGE).max() <= 0.3 + 1e-6 and 0 <= found.image.min() <= found.image.max() <= 1
        none = attack_image(contender.victim(), IMAGE, label, "linf", 1e-6, queries=20)
        assert not none.success and contender.read(none.image).label == label


def test_gradients_first_then_what_the_defense_ships() -> None:
    torch.manual_seed(0)
    net = build_network("digits_cnn", input_shape=SHAPE, num_classes=10).eval()
    plain = TorchSystem(net, input_shape=SHAPE, num_classes=10)
    label = int(plain.decide(torch.from_numpy(IMAGE))[0])
    found = attack_image(plain, IMAGE, label, "linf", 0.5)
    assert found.white_box and found.success and found.tried[0] == "APGD on cross-entropy"
    held = attack_image(plain, IMAGE, label, "linf", 1e-6, steps=3)
    assert held.tried == ("APGD on cross-entropy", "APGD on the margin") and not held.success
    names = [name for name, _ in procedures(imt_system(), "linf", 5, 5)]
    assert names[:2] == list(held.tried) and "pre compensation" in names
    assert not any(attack.published for _, attack in procedures(imt_system(), "linf", 5, 5))


# --- pictures to start with ---------------------------------------------------------------------------------


def test_samples_are_test_images_of_every_class(digits: Loaded, raw: Path) -> None:
    samples = Samples.load("digits", raw, SHAPE)
    assert len(samples) == len(digits.test)
    first, again, other = samples.some(14, 0), samples.some(14, 0), samples.some(14, 1)
    assert first == again != other and len(set(first)) == 14
    assert {samples.take(index)[1] for index in first} == set(range(10))
    image, label = samples.take(first[0])
    assert image.shape == (1, *SHAPE) and image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1
    assert label == digits.test.labels[first[0]]
    for nothing in (Samples.load("digits", raw, (3, 8, 8)), Samples.load("digits", raw / "no", SHAPE),
                    Samples.load("holidays", raw, SHAPE)):  # fmt: skip
        assert len(nothing) == 0 and nothing.some(14, 0) == []


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(models: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, "--data", str(raw), folder=tmp_path_factory.mktemp("demo"), command="demo") as started:
        yield started
    assert "Traceback" not in started.log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no chromium on this machine, or no playwright: the page is not looked at")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def attacked(page: Page) -> list[str]:
    """Press the button, wait for both models; their verdicts."""
    page.click(".attack")
    page.wait_for_function("document.querySelectorAll('.card .story').length === 2")
    return [badge.inner_text() for badge in page.query_selector_all(".card .badge")]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def test_the_page_in_a_browser(width: int, scheme: Any, demo: Server, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda told: complaints.append(told.text) if told.type == "error" else None)
    page.goto(f"http://127.0.0.1:{demo.port}")
    page.wait_for_selector(".card .answers")
    assert len(page.query_selector_all(".thumb")) == 14 and page.query_selector(".card .story") is None

    assert attacked(page).count("fooled") >= 1
    assert len(page.query_selector_all(".card .score")) == 2  # of the robust one: before and after
    page.screenshot(path=tmp_path / "attacked.png", full_page=True)
    assert (tmp_path / "attacked.png").stat().st_size > 20_000
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out

    page.focus(".slider [tabindex]")
    page.keyboard.press("ArrowLeft")  # another budget: what was found holds no more
    page.wait_for_function("document.querySelectorAll('.card .story').length === 0")
    assert page.inner_text(".amount b") != f"{ABOUT.radius:.3f}"

    page.set_input_files("input[type=file]", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector(".q-notification")
    assert "not a picture that can be read" in page.inner_text(".q-notification")
    picture = encoded(GREY.resize((60, 40)))
    page.set_input_files("input[type=file]", {"name": "b.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector("text=resized from 60 x 40 to 8 x 8")
    assert len(attacked(page)) == 2
    assert all(url.startswith((f"http://127.0.0.1:{demo.port}/", "data:", "blob:", "ws://127")) for url in asked)
    assert complaints == []
    page.close()
