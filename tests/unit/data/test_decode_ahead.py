"""Decoding while the command still imports: the split is found decoded, or decoded as ever."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightship.commands import dispatch
from lightship.commands.base import Command
from lightship.config import Config, DataConfig, TrainerConfig
from lightship.data import decode_ahead, decoded_cache, image_split, table_cache
from lightship.data.image_split import ImageSplit
from lightship.data.manifest import Manifest
from lightship.data.sources import layouts
from lightship.data.splits import load_splits
from lightship.distributed import launcher


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Of 10 MB of images."""
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decode_ahead, "_running", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for i in range(8):
        path = tmp_path / f"images/train/{'xy'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (680, 680, 3), np.uint8)
        Image.fromarray(noise).save(path, compress_level=0)
    return DataConfig(root=str(tmp_path / "images"), image_size_px=8, val_fraction=0)


def begun(config: DataConfig) -> "subprocess.Popen[bytes]":
    decode_ahead.begin(config)
    assert decode_ahead._running is not None
    return decode_ahead._running.process


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


def test_its_scan_is_the_commands_once(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what the scan has logged."""
    Path(config.root, "train/x/notes.heic").touch()
    config.val_fraction = 0.25
    expected = load_splits(config, None, "train")
    warnings = [record.getMessage() for record in caplog.records]
    assert any("heic" in text for text in warnings)
    caplog.clear()

    begun(config)
    with monkeypatch.context() as without:
        without.setattr(layouts, "scan", None)  # not called
        found = load_splits(config, None, "train")
    assert {name: split.fingerprint() for name, split in found.items()} == {
        name: split.fingerprint() for name, split in expected.items()
    }
    assert [record.getMessage() for record in caplog.records] == warnings
    assert decode_ahead.scanned(config) is None
    for name, split in found.items():
        ImageSplit(config, name, split, 8)  # which waits for it
        assert decode_ahead.content_of(split) == decoded_cache.content_of(split)


def test_its_scan_is_of_its_settings(config: DataConfig) -> None:
    begun(config)
    other = dataclasses.replace(config, val_fraction=0.25)
    assert decode_ahead.scanned(other) is None
    assert set(load_splits(other, None, "train")) == {"train", "val"}
    assert decode_ahead.scanned(config) is not None


def test_a_table_that_is_gone_is_made_again(config: DataConfig) -> None:
    process = begun(config)
    process.wait(120)
    for path in table_cache.folder_of_copies().iterdir():
        path.unlink()
    assert set(load_splits(config, None, "train")) == {"train"}


FIT = """
import os, sys
os.sched_getaffinity = lambda _: {0, 1}
from lightship import cli
from lightship.data import decode_ahead
from lightship.data.sources import layouts
layouts.scan = None  # not called
start = decode_ahead._start
decode_ahead._start = lambda config: (print("begun"), start(config))
code = cli.main(["fit", *sys.argv[1:]])
print(code, decode_ahead._running)
"""


def test_a_fit_takes_its_scan_and_leaves_nothing_for_the_next(config: DataConfig) -> None:
    """Which may find other images there."""
    flags = [
        f"--data.root={config.root}",
        f"--run.output={config.root}-run",
        "--data.val_fraction=0",
    ]
    flags += ["--data.image_size_px=16", "--data.global_batch_size=2", "--trainer.max_steps=1"]
    flags += ["--run.tracking=none", "--model.net=litcnn", "--trainer.accelerator=cpu"]
    command = [sys.executable, "-c", FIT, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "begun" in lines
    assert lines[-1] == "0 None"


def test_a_scan_that_fails_has_shown_its_progress_alone(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its warnings are those of the scan that follows."""
    lines = [("lightship.data", logging.INFO, "100 % so far"), ("lightship.data", 30, "odd files")]
    code = "".join(f"print({json.dumps({'log': line})!r})\n" for line in lines)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    decode_ahead._running = decode_ahead._Ahead(process, config)
    with caplog.at_level(logging.INFO, "lightship.data"):
        assert decode_ahead.scanned(config) is None
    assert [record.getMessage() for record in caplog.records] == ["100 % so far"]


def test_a_process_that_dies_leaves_the_work(config: DataConfig) -> None:
    begun(config).send_signal(signal.SIGKILL)
    assert decode_ahead.scanned(config) is None
    assert set(load_splits(config, None, "train")) == {"train"}
    assert ImageSplit(config, "train", train(config), 8).decoded is not None


def test_it_ends_with_its_owner(config: DataConfig) -> None:
    process = begun(config)
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
    assert (decode_ahead._running is not None) == begins


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
    assert decode_ahead._running is None


@pytest.mark.parametrize(
    "setting",
    [{"mode": "streaming"}, {"decoded_cache_gib": 0}, {"root": "digits"}, {"root": "s3://b/x"}],
    ids=str,
)
def test_is_not_begun_where_it_is_of_no_use(config: DataConfig, setting: dict) -> None:
    for name, value in setting.items():
        setattr(config, name, value)
    decode_ahead.begin(config)
    assert decode_ahead._running is None
