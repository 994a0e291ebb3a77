"""The sign of life: in every stage, at most once a second, and only where somebody asks for it."""

import os
import time
from pathlib import Path

import pytest

from lightship.errors import ConfigError
from lightship.training.callbacks import heartbeat
from lightship.training.callbacks.heartbeat import VARIABLE, Heartbeat, build_heartbeat
from tests.support.little_fit import ValLoader, classifier, fit


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the callback reads, in its only item."""
    now = [0.0]
    monkeypatch.setattr(heartbeat, "monotonic", lambda: now[0])
    return now


def age_at(path: Path, time_s: int) -> None:
    os.utime(path, (time_s, time_s))


def test_touched_at_most_once_a_second(tmp_path: Path, clock: list[float]) -> None:
    beat = Heartbeat(tmp_path / "beat")
    beat.beat()
    age_at(beat.path, 1000)
    clock[0] = 0.9
    beat.beat()
    assert beat.path.stat().st_mtime == 1000
    clock[0] = 1.1
    beat.beat()
    assert beat.path.stat().st_mtime > 1000


def test_every_stage_beats(tmp_path: Path) -> None:
    counts = [0]

    class Counted(Heartbeat):
        def beat(self) -> None:
            counts[0] += 1
            super().beat()

    counted = Counted(tmp_path / "beat")
    trainer = fit([counted], train_batches=3, val_batches=2, max_epochs=1)
    assert counts == [3 + 2]
    trainer.test(classifier(), ValLoader(2), verbose=False)
    assert counts == [3 + 2 + 2]
    trainer.predict(classifier(), ValLoader(2))
    assert counts == [3 + 2 + 2 + 2]
    assert counted.path.exists()


def test_a_restart_has_as_long_as_a_start(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "beat"
    monkeypatch.setenv(VARIABLE, str(path))
    heartbeat.begin_again()
    assert not path.exists()  # or the startup probe would succeed before the first batch
    path.touch()
    age_at(path, 1000)
    began_s = time.time()
    heartbeat.begin_again()
    assert path.stat().st_mtime >= began_s + heartbeat.START_GRACE_S - 1
    Heartbeat(path).beat()  # the first batch: from now on the liveness probe's bound holds
    assert path.stat().st_mtime < began_s + heartbeat.START_GRACE_S - 1


def test_no_variable_no_callback(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert build_heartbeat() == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none" / "beat"))
    with pytest.raises(ConfigError, match=f"{VARIABLE} is .*none/beat: .*none is not a writable"):
        build_heartbeat()
