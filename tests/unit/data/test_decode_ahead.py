"""Decoding while the command still imports: the split is found decoded, or decoded as ever."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightship.commands import dispatch
from lightship.commands.base import Command
from lightship.config import Config, DataConfig, TrainerConfig
from lightship.data import decode_ahead, image_split
from lightship.data.image_split import ImageSplit
from lightship.data.manifest import Manifest
from lightship.data.sources import layouts
from lightship.distributed import launcher


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Of 10 MB of images."""
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decode_ahead, "_process", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for i in range(8):
        path = tmp_path / f"images/train/{'xy'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (680, 680, 3), np.uint8)
        Image.fromarray(noise).save(path, compress_level=0)
    return DataConfig(root=str(tmp_path / "images"), image_size_px=8, val_fraction=0)


def train(config: DataConfig) -> Manifest:
    return layouts.scan(config.root)["train"].within(config.max_sample_mib)


def test_a_split_is_found_decoded(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = train(config)
    expected, _ = image_split.decode_all(manifest, None, 8)
    monkeypatch.setattr(image_split, "decode_all", None)  # not called
    decode_ahead.begin(config)
    decoded = ImageSplit(config, "train", manifest, 8).decoded
    assert decoded is not None
    np.testing.assert_array_equal(decoded.numpy(), expected)


def test_a_process_that_dies_leaves_the_work(config: DataConfig) -> None:
    decode_ahead.begin(config)
    assert decode_ahead._process is not None
    decode_ahead._process.send_signal(signal.SIGKILL)
    assert ImageSplit(config, "train", train(config), 8).decoded is not None


def test_it_ends_with_its_owner(config: DataConfig) -> None:
    decode_ahead.begin(config)
    process = decode_ahead._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # long before the images are decoded
    assert process.wait(120) == 1


@pytest.mark.parametrize(
    ("devices", "environment", "begins"),
    [
        ("1", {}, True),
        ("2", {}, False),
        ("auto", {"PET_NPROC_PER_NODE": "2"}, False),
        ("auto", {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, False),
    ],
)
def test_is_begun_by_the_only_rank(
    devices: str, environment: dict, begins: bool, config: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An agent's ranks would decode the split beside it."""
    command = Command("fit", Config(data=config))
    command.config.run.output = f"{config.root}-run"
    command.config.trainer.devices = devices
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "launch", lambda *_: None)
    with monkeypatch.context() as fresh:
        fresh.delitem(sys.modules, "torch")  # as in a command that has just started
        dispatch.run(command, [])
    assert (decode_ahead._process is not None) == begins


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "PJRT_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    found = []
    for name in ("nvidiactl", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
        found.append(launcher.works_in_this_process(TrainerConfig(), str(tmp_path)))
    assert found == [True, True, False]
    assert launcher.works_in_this_process(TrainerConfig(accelerator="cpu"), str(tmp_path))


def test_a_process_that_cannot_be_started_leaves_the_work(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(decode_ahead, "spawn", refused)
    decode_ahead.begin(config)
    assert decode_ahead._process is None


@pytest.mark.parametrize(
    "setting",
    [{"mode": "streaming"}, {"decoded_cache_gib": 0}, {"root": "digits"}, {"root": "s3://b/x"}],
    ids=str,
)
def test_is_not_begun_where_it_is_of_no_use(config: DataConfig, setting: dict) -> None:
    for name, value in setting.items():
        setattr(config, name, value)
    decode_ahead.begin(config)
    assert decode_ahead._process is None
