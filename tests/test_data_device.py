"""Batches on the device: order, resuming, augmentation against a slow reference."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from casemate.data.base import Images
from casemate.data.device import Batch, DeviceData, crop, mirror
from casemate.errors import UserError


@pytest.fixture(scope="module")
def images() -> Images:
    draw = np.random.default_rng(0)
    return Images(draw.integers(0, 256, (50, 6, 5, 3), dtype=np.uint8), draw.integers(0, 10, 50))


def epoch(data: DeviceData, **options: object) -> list[Batch]:
    return list(data.batches(8, **{"seed": 1, "epoch": 0, **options}))  # type: ignore[arg-type]


def test_values_are_exact_fractions(images: Images) -> None:
    data = DeviceData(images, "cpu")
    x = data.x(torch.tensor([3, 0]))
    assert x.shape == (2, 3, 6, 5) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x[0], torch.from_numpy(images.images[3].astype(np.float32) / 255).permute(2, 0, 1))
    assert data.images.shape == (50, 3, 6, 5) and data.images.dtype == torch.uint8


def test_the_callers_array_is_not_shared(images: Images) -> None:
    own = Images(images.images.copy(), images.labels.copy())
    data = DeviceData(own)
    own.images[:], own.labels[:] = 0, 0
    assert data.images.any() and data.labels.any()


def test_an_epoch_is_every_sample_once(images: Images) -> None:
    batches = epoch(DeviceData(images))
    assert [len(b.y) for b in batches] == [8] * 6 + [2]
    order = torch.cat([b.indices for b in batches])
    assert order.sort().values.tolist() == list(range(50)) and order.tolist() != list(range(50))
    assert torch.cat([b.y for b in batches]).tolist() == images.labels[order].tolist()
    assert [len(b.y) for b in epoch(DeviceData(images), drop_last=True)] == [8] * 6


def test_any_epoch_from_any_batch_without_those_before(images: Images) -> None:
    options = {"epoch": 3, "pad": 2, "flip": True}
    whole = epoch(DeviceData(images), **options)
    rest = epoch(DeviceData(images), start=4, **options)
    assert len(rest) == 3
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.indices, b.indices)


def test_epochs_and_seeds_differ(images: Images) -> None:
    data = DeviceData(images)
    orders = [torch.cat([b.indices for b in epoch(data, **o)]).tolist() for o in ({}, {"epoch": 1}, {"seed": 2})]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_does_not_depend_on_the_augmentation(images: Images) -> None:
    data = DeviceData(images)
    plain, augmented = epoch(data), epoch(data, pad=2, flip=True)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(plain, augmented, strict=True))


def test_channels_last_is_a_layout_and_not_a_change(images: Images) -> None:
    options = {"pad": 1, "flip": True}
    plain, other = (epoch(DeviceData(images, channels_last=c), **options) for c in (False, True))
    assert all(torch.equal(a.x, b.x) for a, b in zip(plain, other, strict=True))
    assert all(b.x.is_contiguous(memory_format=torch.channels_last) for b in other)
    assert all(b.x.is_contiguous() for b in plain)


def test_crop_against_a_slow_reference(images: Images) -> None:
    batch = torch.from_numpy(images.images)
    pad = 2
    top, left = torch.randint(0, 5, (50,)), torch.randint(0, 5, (50,))
    top[0], left[0], top[1], left[1] = 0, 0, 4, 4  # the corners
    cut = crop(batch, pad, top, left)
    for i in range(50):
        padded = np.pad(images.images[i], ((pad, pad), (pad, pad), (0, 0)))
        assert (cut[i].numpy() == padded[top[i] : top[i] + 6, left[i] : left[i] + 5]).all()


def test_mirror_against_a_slow_reference(images: Images) -> None:
    chosen = torch.arange(50) % 3 == 0
    result = mirror(torch.from_numpy(images.images), chosen)
    for i in range(50):
        expected = images.images[i][:, ::-1] if chosen[i] else images.images[i]
        assert (result[i].numpy() == expected).all()


def test_offsets_and_mirroring_are_drawn_for_each_sample() -> None:
    one = np.zeros((400, 5, 5, 1), dtype=np.uint8)
    one[:, 2, 1] = 255  # one pixel tells the offset and the mirroring of each sample
    data = DeviceData(Images(one, np.zeros(400, dtype=np.int64)))
    (batch,) = data.batches(400, seed=0, epoch=0, pad=1, flip=True)
    places = {tuple(x[0].nonzero()[0].tolist()) for x in batch.x}
    # rows 1..3; columns 0..2 as they are, 2..4 mirrored
    assert places == {(row, column) for row in (1, 2, 3) for column in range(5)}
    columns = torch.stack([x[0].nonzero()[0] for x in batch.x])[:, 1]
    assert 0.25 < float((columns > 2).float().mean()) < 0.42  # 1/3 of all, were the draws fair


def test_sequential_goes_through_in_order(images: Images) -> None:
    batches = list(DeviceData(images).sequential(20))
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(50))
    assert torch.equal(batches[1].x[0], DeviceData(images).x(torch.tensor([20]))[0])


def test_a_batch_larger_than_the_data_with_drop_last_is_an_error(images: Images) -> None:
    with pytest.raises(UserError, match="batch size 64 is more than the 50"):
        next(DeviceData(images).batches(64, seed=0, epoch=0, drop_last=True))


def test_the_order_is_the_same_in_another_process(images: Images) -> None:
    code = (
        "import numpy as np, torch\n"
        "from casemate.data.base import Images\n"
        "from casemate.data.device import DeviceData\n"
        "d = DeviceData(Images(np.zeros((50, 6, 5, 3), np.uint8), np.zeros(50, np.int64)))\n"
        "print([int(i) for b in d.batches(8, seed=1, epoch=0) for i in b.indices])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([int(i) for b in epoch(DeviceData(images)) for i in b.indices])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches(images: Images) -> None:
    here, there = (epoch(DeviceData(images, device), pad=2, flip=True) for device in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        assert b.x.is_cuda and torch.equal(a.x, b.x.cpu()) and torch.equal(a.indices, b.indices.cpu())
