"""What `--ckpt_path` takes, and how it names what it refuses."""

from pathlib import Path

import pytest
import torch

from lightship.checkpoint.loading import MODEL_KEYS, RESUME_KEYS, load_ckpt_path
from lightship.errors import ConfigError


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A file that a model can be built from, and no more."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    return str(path)


def test_what_a_model_needs_is_not_enough_to_resume(url: str) -> None:
    assert set(load_ckpt_path(url, MODEL_KEYS)) == MODEL_KEYS
    with pytest.raises(ConfigError, match=r"--ckpt_path .*model\.ckpt .*lacks lightship.*weights"):
        load_ckpt_path(url, RESUME_KEYS)


def test_a_store_takes_only_what_was_committed(url: str, tmp_path: Path) -> None:
    assert load_ckpt_path(url, MODEL_KEYS, f"{tmp_path}/elsewhere")
    with pytest.raises(ConfigError, match=r"--ckpt_path .*model\.ckpt was never committed"):
        load_ckpt_path(url, MODEL_KEYS, str(tmp_path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ckpt_path .*no\.ckpt: checkpoint no\.ckpt is gone"):
        load_ckpt_path(f"{tmp_path}/no.ckpt", MODEL_KEYS)
