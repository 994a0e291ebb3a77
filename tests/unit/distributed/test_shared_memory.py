"""Too little /dev/shm is told before NCCL finds out."""

from pathlib import Path

import pytest

from lightship.distributed import shared_memory
from lightship.errors import ConfigError


def test_more_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        shared_memory.check(10**7, str(tmp_path))
    assert f"{tmp_path} has " in str(told.value)
    assert "--shm-size=1280000000m" in str(told.value)
    assert "sizeLimit: 1280000000Mi" in str(told.value)
    assert told.value.exit_code == 78


def test_enough_and_not_needed(tmp_path: Path) -> None:
    shared_memory.check(2, str(tmp_path))
    shared_memory.check(1, "/proc")  # has no room at all; a single GPU shares with nobody
    with pytest.raises(ConfigError):
        shared_memory.check(2, "/proc")
    shared_memory.check(8, str(tmp_path / "nothing"))
