"""A start that takes a run over from one that still runs, and one of a finished run."""

from pathlib import Path

import pytest
import torch
import yaml

from lightship.checkpoint.store import CheckpointStore
from lightship.config import Config
from lightship.errors import ConfigError
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_epochs", "many"), ("max_epochs", None), ("early_stopping_patience", [1]),
     ("max_steps", float("nan")), ("monitor", 3)],
)  # fmt: skip
def test_a_finished_run_of_wrong_settings_is_refused_by_their_name(
    config: Config, earlier: CheckpointStore, tmp_path: Path, name: str, value: object
) -> None:
    (tmp_path / "DONE").write_text('{"val/acc": 0.5}')
    folder = RunFolder(config)
    path = tmp_path / config_file.FILE
    content = yaml.safe_load(path.read_text())
    content["trainer"][name] = value
    path.write_text(yaml.safe_dump(content))
    for read in (folder.completed, folder._metric_before):
        with pytest.raises(ConfigError, match=rf"config\.yaml: trainer\.{name} is ") as error:
            read()
        assert error.value.exit_code == 78


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
