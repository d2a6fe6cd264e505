"""The NIPS 2017 pictures: read by their table, halved once and for all, labels beyond a byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casemate.data.nips17 import NIPS17
from casemate.data.sources import LOCAL_VARIABLE
from casemate.errors import UserError


def small(**attributes: object) -> NIPS17:
    """At 6x6, with five pictures in each half."""
    kind = {"input_shape": (3, 6, 6), "counts": {"train": 5, "test": 5}, **attributes}
    made: NIPS17 = type("NIPS17", (NIPS17,), kind)()
    return made


def fill(folder: Path, count: int = 10) -> None:
    lines = ["ImageId,URL,TrueLabel,TargetClass"]
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 10), (i, 100, 200)).save(folder / "images" / f"p{i}.png")
        lines.append(f"p{i},somewhere,{100 * i + 1},7")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")


def test_every_picture_is_in_one_half_with_its_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "mine")
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "mine"))
    dataset = small()
    dataset.fetch(tmp_path / "raw")
    train, test = (dataset.load(tmp_path / "raw", split) for split in ("train", "test"))
    shades = np.concatenate([half.images[:, 3, 3, 0] for half in (train, test)])
    labels = np.concatenate([half.labels for half in (train, test)])
    assert sorted(shades.tolist()) == list(range(10)) and labels.tolist() == (100 * shades.astype(int)).tolist()
    assert train.images.shape == (5, 6, 6, 3) and dataset.fetch(tmp_path / "raw") == "already there"


def test_a_picture_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"no images.csv in .* put images.csv of the NIPS 2017 development set"):
        small().fetch(tmp_path / "raw")
    (tmp_path / "mine").rmdir()
    fill(tmp_path / "mine")
    (tmp_path / "mine" / "images" / "p3.png").unlink()
    with pytest.raises(UserError, match="names 10 pictures, and 1 of them are not there"):
        small().fetch(tmp_path / "raw")
    (tmp_path / "mine" / "images" / "p3.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"p3.png is not a picture"):
        small().fetch(tmp_path / "raw")


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ("name,label\np1,3\n", "needs the columns ImageId and TrueLabel, and has name, label"),
        ("", "needs the columns ImageId and TrueLabel, and has none"),
        ("ImageId,TrueLabel\np1,3\np2\n", "line 3: its TrueLabel is not a number"),
        ("ImageId,TrueLabel\np1,cat\n", "line 2: its TrueLabel is not a number"),
    ],
)
def test_a_table_that_is_another_is_said(
    table: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "mine")
    (tmp_path / "mine" / "images.csv").write_text(table)
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "mine"))
    with pytest.raises(UserError, match=wrong) as error:
        small().fetch(tmp_path / "raw")
    assert "It cannot be downloaded: put images.csv" in str(error.value)
    assert "network" not in str(error.value)
