"""A user's pictures: sizes, colours, bad files, and messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casemate.data.folder import read_folder
from casemate.data.pictures import Unreadable, convert, decode, fit
from casemate.errors import UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(path: Path, size: tuple[int, int] = (4, 4), color: object = RED, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    picture(root / "cat" / "b.png", color=GREEN)
    picture(root / "cat" / "a.png")
    picture(root / "dog" / "c.JPEG", size=(40, 20))
    (root / "dog" / "notes.txt").write_text("not a picture, and not meant to be")
    (root / ".cache").mkdir()
    return root


def test_order_labels_and_values(pets: Path) -> None:
    read = read_folder(pets, (3, 4, 4))
    assert read.classes == ("cat", "dog") and read.paths == ("cat/a.png", "cat/b.png", "dog/c.JPEG")
    assert read.images.labels.tolist() == [0, 0, 1] and read.images.labels.dtype == np.int64
    assert read.images.images.shape == (3, 4, 4, 3) and read.images.images.dtype == np.uint8
    assert (read.images.images[0] == RED).all() and (read.images.images[1] == GREEN).all()
    assert read.unreadable == ()
    assert read.conversion == "RGB; 1 of 3 scaled and cut at the centre to 4x4"


def test_labels_follow_the_models_classes(pets: Path) -> None:
    read = read_folder(pets, (3, 4, 4), classes=("dog", "horse", "cat"))
    assert read.images.labels.tolist() == [0, 2, 2] and read.classes == ("dog", "horse", "cat")
    with pytest.raises(UserError, match="cat is not a class of the model; did you mean 'cats'"):
        read_folder(pets, (3, 4, 4), classes=("dog", "cats"))


def test_per_class_takes_the_first_by_name(pets: Path) -> None:
    assert read_folder(pets, (3, 4, 4), per_class=1).paths == ("cat/a.png", "dog/c.JPEG")


def test_grey_is_the_stated_luma(pets: Path) -> None:
    read = read_folder(pets, (1, 4, 4))
    assert read.images.images.shape == (3, 4, 4, 1)
    # 0.299 * 255 = 76.2, 0.587 * 255 = 149.7
    assert read.images.images[0].max() == 76 and read.images.images[1].max() in (149, 150)


def test_scaling_covers_and_cuts_at_the_centre() -> None:
    strip = Image.new("RGB", (30, 10))
    for x, color in ((0, (0, 0, 255)), (10, RED), (20, GREEN)):
        strip.paste(color, (x, 0, x + 10, 10))
    cut = np.asarray(fit(strip, 10, 10))
    assert (cut[:, 2:8] == RED).all()
    halved = np.asarray(fit(strip, 5, 5))
    assert halved.shape == (5, 5, 3) and (halved[:, 1:4] == RED).all()


@pytest.mark.parametrize(
    ("made", "rgb"),
    [
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("RGBA", (2, 2), (9, 8, 7, 0)), (9, 8, 7)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("P", (2, 2), 0), (0, 0, 0)),
        (Image.fromarray(np.full((2, 2), 0x1234, dtype=np.uint16)), (0x12, 0x12, 0x12)),
    ],
)
def test_every_colour_mode_becomes_rgb(made: Image.Image, rgb: tuple[int, int, int]) -> None:
    assert (np.asarray(convert(made, 3)) == rgb).all()


def test_the_cameras_rotation_is_applied(tmp_path: Path) -> None:
    tall = Image.new("RGB", (2, 6))
    exif = tall.getexif()
    exif[0x0112] = 6  # orientation: turn a quarter to the right
    tall.save(tmp_path / "a.jpg", exif=exif)
    assert decode((tmp_path / "a.jpg").read_bytes()).size == (6, 2)


def test_bad_files_are_left_out_and_reported(pets: Path) -> None:
    whole = picture(pets / "dog" / "d.png", size=(64, 64)).read_bytes()
    (pets / "dog" / "d.png").write_bytes(whole[: len(whole) // 2])
    (pets / "dog" / "e.png").write_text("hello")
    (pets / "dog" / "f.png").write_bytes(b"")
    read = read_folder(pets, (3, 4, 4))
    assert len(read.images) == len(read.paths) == 3 and read.images.images.shape[0] == 3
    told = dict(line.split(": ", 1) for line in read.unreadable)
    assert set(told) == {"dog/d.png", "dog/e.png", "dog/f.png"}
    assert "damaged" in told["dog/d.png"] and told["dog/e.png"] == "is not a picture"


def test_a_picture_with_absurdly_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((11, 11), (30, 30)):  # Pillow only warns up to twice its limit
        with pytest.raises(Unreadable, match="too many pixels"):
            decode(picture(tmp_path / "a.png", size=size).read_bytes())


def test_nothing_to_read_is_an_error_that_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_folder(tmp_path / "gone", (3, 4, 4))
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="no sub-folders; put the pictures of each class"):
        read_folder(tmp_path / "flat", (3, 4, 4))
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="no picture files"):
        read_folder(tmp_path / "empty", (3, 4, 4))
    (tmp_path / "empty" / "cat" / "a.png").write_text("x")
    with pytest.raises(UserError, match=r"none of 1 files is a readable picture; the first: cat/a.png"):
        read_folder(tmp_path / "empty", (3, 4, 4))


def test_shapes_that_cannot_be(pets: Path) -> None:
    with pytest.raises(UserError, match="the model takes 4"):
        read_folder(pets, (4, 8, 8))
    with pytest.raises(UserError, match="exceed 4 GiB"):
        read_folder(pets, (3, 30_000, 30_000))
