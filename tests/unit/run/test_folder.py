"""A start that takes a run over from one that still runs."""

from pathlib import Path

import pytest
import torch

from lightship.checkpoint.store import CheckpointStore
from lightship.config import Config
from lightship.run import config_file
from lightship.run.folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.run.output = str(tmp_path)
    config_file.write(str(tmp_path), config)
    return config


@pytest.fixture
def earlier(tmp_path: Path) -> CheckpointStore:
    """Of a start that runs."""
    store = CheckpointStore(f"{tmp_path}/checkpoints")
    store.open_attempt()
    save(store, 1)
    return store


def save(store: CheckpointStore, step: int) -> None:
    weights = {"w": torch.tensor(step)}
    state = {"global_step": step, "epoch": 0, "state_dict": weights, "lightship": {"score": None}}
    store.save_checkpoint(state, store.path_of_step(step))
    store.wait()


def test_what_an_earlier_start_saved_meanwhile_is_resumed_from(
    config: Config, earlier: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It deletes the checkpoint that was chosen first."""
    folder, newest = RunFolder(config), CheckpointStore.newest
    earlier.keep_last = 1

    def chosen_slowly(self: CheckpointStore) -> object:
        chosen = newest(self)
        if earlier._saves < 3:
            save(earlier, 2)
            save(earlier, 3)
        return chosen

    monkeypatch.setattr(CheckpointStore, "newest", chosen_slowly)
    start = folder.open()
    assert start.step == 3
    assert start.url is not None
    assert folder.checkpoints.load_checkpoint(start.url)["state_dict"]["w"] == 3


def test_a_start_alone_reads_its_checkpoint_once(
    config: Config, earlier: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = RunFolder(config), []
    newest = CheckpointStore.newest
    monkeypatch.setattr(
        CheckpointStore, "newest", lambda self: chosen.append(newest(self)) or chosen[-1]
    )
    assert folder.open().step == 1
    assert len(chosen) == 1
