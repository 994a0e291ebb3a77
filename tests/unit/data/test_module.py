"""The data module: the size of images that are not resized, the regime, statistics, memory."""

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightship.config import DataConfig
from lightship.data.image_split import ImageSplit
from lightship.data.module import ImageData
from lightship.data.resident import ResidentSplit
from lightship.data.splits import load_splits
from lightship.errors import DataError
from lightship.versions import NewerVersion
from tests.support.images import put

MODES = ("resident", "streaming", "auto")


def png(width: int, height: int, level: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, **splits: list[bytes]) -> str:
    files = {
        f"{split}/{'ant' if place < 3 else 'bee'}/{place:03d}.png": data
        for split, images in splits.items()
        for place, data in enumerate(images)
    }
    put(str(path / "set"), files)
    return str(path / "set")


def ready(root: str, *splits: str, **settings: Any) -> ImageData:
    config = DataConfig(root=root, val_fraction=0, **settings)
    data = ImageData(config, load_splits(config, None, "train"), seed=0, accumulate=1)
    for split in splits or ("train",):
        data.prepare(split)
    return data


def test_a_damaged_table_beside_a_run_is_made_again(tmp_path: Path, caplog) -> None:
    root = folder(tmp_path, train=[png(20, 20)] * 6)
    config = DataConfig(root=root, val_fraction=0)
    load_splits(config, str(tmp_path / "run"), "train")
    [kept] = (tmp_path / "run").iterdir()
    whole = kept.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"text"):
        kept.write_bytes(damage)
        caplog.clear()
        train = load_splits(config, str(tmp_path / "run"), "train")["train"]
        assert len(caplog.messages) == 1
        assert "scanning --data.root again" in caplog.text
        assert kept.read_bytes() == whole
        assert len(train) == 6
    load_splits(config, str(tmp_path / "run"), "train")
    assert len(caplog.messages) == 1


def test_a_run_keeps_the_version_of_its_order(tmp_path: Path) -> None:
    data = ready(folder(tmp_path, train=[png(20, 20)] * 6))
    assert data.state_dict() == {"order": 2}
    data.load_state_dict({})  # of 0.1.0
    assert data.state_dict() == {"order": 1}
    with pytest.raises(NewerVersion, match=r"version 3 .*\(order\).*reads up to 2"):
        data.load_state_dict({"order": 3})


@pytest.mark.parametrize("mode", MODES)
def test_images_that_are_not_square_need_a_size_in_every_mode(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path, train=[png(28, 20)] * 6)
    with pytest.raises(DataError, match=r"000\.png is 28x20 px.*--data\.image_size_px"):
        ready(root, mode=mode)
    assert ready(root, mode=mode, image_size_px=16).image_size_px == 16


@pytest.mark.parametrize("mode", MODES)
def test_a_split_of_another_size_than_train_needs_a_size_in_every_mode(tmp_path, mode) -> None:
    root = folder(tmp_path, train=[png(20, 20)] * 6, val=[png(30, 30)] * 4)
    with pytest.raises(DataError, match=r"30x30 px.*20x20 px.*--data\.image_size_px"):
        ready(root, "train", "val", mode=mode).examples("val", 4)


@pytest.mark.parametrize("first", [b"", b"no image", png(20, 20)[:40]])
@pytest.mark.parametrize("mode", MODES)
def test_bad_first_images_are_counted_and_the_next_gives_the_size(tmp_path, mode, first) -> None:
    root = folder(tmp_path, train=[first, png(20, 20), first, *[png(20, 20)] * 5])
    settings = {"on_error": "skip", "max_bad_fraction": 0.3, "mode": mode}
    data = ready(root, **settings)
    assert data.image_size_px == 20
    assert 0 in data.unreadable("train")
    assert len(data.examples("train", 8)[0]) == 6


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_first_image_is_named(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path, train=[b"", *[png(20, 20)] * 5])
    with pytest.raises(DataError, match=r"train/ant/000\.png.*--data\.on_error skip"):
        ready(root, mode=mode)
    skip = {"on_error": "skip", "max_bad_fraction": 0.1}
    with pytest.raises(DataError, match=r"--data\.max_bad_fraction.*train/ant/000\.png"):
        ready(root, mode=mode, **skip)


def test_a_bad_first_image_does_not_change_the_mode(tmp_path: Path) -> None:
    root = folder(tmp_path, train=[b"", *[png(20, 20)] * 5])
    skip = {"on_error": "skip", "max_bad_fraction": 0.5}
    for settings in ({"mode": "streaming"}, {"mode": "auto", "resident_gib": 0.0}):
        assert ready(root, **skip, **settings).prepare("train").decoded is None


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_no_image_that_can_be_read(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path, train=[b""] * 4)
    with pytest.raises(DataError, match="none of 4 images can be read"):
        ready(root, mode=mode, on_error="skip", max_bad_fraction=1.0)


@pytest.mark.parametrize("mode", ["resident", "streaming", "streaming without the worker"])
def test_examples_may_all_be_bad(tmp_path: Path, mode: str, monkeypatch) -> None:
    """As long as the split has others."""
    if "without" in mode:
        monkeypatch.setattr(ImageSplit, "_is_for_worker", lambda self, ids: False)
    root = folder(tmp_path, train=[png(20, 20)] * 6, val=[b"no image", *[png(20, 20)] * 3])
    skip = {"on_error": "skip", "max_bad_fraction": 0.3}
    data = ready(root, "train", "val", mode=mode.partition(" ")[0], image_size_px=20, **skip)
    images, labels, ids = data.examples("val", 1)
    assert images.shape == (0, 3, 20, 20)
    assert labels.shape == ids.shape == (0,)
    assert data.images("val", np.array([0])) == {}
    assert list(data.images("val", np.array([0, 2]))) == [2]


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_the_bound_of_an_images_size_is_kept_in_every_mode(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path, train=[png(20, 20)] * 5 + [png(60, 60)])
    settings = {"mode": mode, "image_size_px": 20, "max_image_pixels": 1_000}
    with pytest.raises(DataError, match=r"005\.png.*60x60 px.*--data\.max_image_pixels 1000"):
        ready(root, **settings).examples("train", 6)


@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_statistics_are_of_all_images_and_leave_none_in_memory(tmp_path, mode, monkeypatch):
    monkeypatch.setattr("lightship.data.module._STATISTICS_AT_ONCE", 3)
    root = folder(tmp_path, train=[png(8, 8, level) for level in range(0, 200, 20)])
    data = ready(root, mode=mode)
    read, held = ImageSplit.read, []

    def reading(split: ImageSplit, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, readable = read(split, ids)
        assert len(images) <= 3
        held.append(weakref.ref(images))
        return images, readable

    monkeypatch.setattr(ImageSplit, "read", reading)
    mean, std = data.pixel_statistics()
    np.testing.assert_allclose(mean, [90 / 255] * 3)
    np.testing.assert_allclose(std, [np.std(np.arange(0, 200, 20)) / 255] * 3)
    gc.collect()
    assert len(held) == 4
    assert not any(reference() is not None for reference in held)


def test_a_set_held_on_a_cpu_lies_in_memory_once(tmp_path: Path) -> None:
    data = ready(folder(tmp_path, train=[png(8, 8)] * 6), mode="resident")
    split = data.prepare("train")
    held = split.on(torch.device("cpu"))
    assert isinstance(held, ResidentSplit)
    assert split.decoded is not None
    assert held.pixels.data_ptr() == split.decoded.data_ptr()
    assert held.pixels.is_contiguous()
