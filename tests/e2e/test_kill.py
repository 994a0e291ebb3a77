"""kill -9 at any moment, the same command again: the run is, bit for bit, the one never killed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightship import storage
from lightship.models.classifier import ImageClassifier
from tests.support.killing import (
    STEPS,
    Job,
    assert_as_if_never_killed,
    draw_nothing,
    kill_once,
    many_images,
)
from tests.support.runs import differences, last_state


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return many_images(str(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def unkilled(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """State and sample ids of the run that nobody disturbed and that saved at epochs only."""
    path = tmp_path_factory.mktemp("unkilled")
    job = Job(path, str(path / "run"), images)
    ids = job.finish()
    assert [step for step, _ in ids] == list(range(STEPS))
    return last_state(job.output), ids


@pytest.mark.parametrize("where", ["local", "s3"])
def test_killed_and_started_again_until_it_is_done(
    where: str, images: str, unkilled, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output = str(tmp_path / "run")
    kinds = ["random", "in a write", "random", "in a write", "random", "in a write"]
    if where == "s3":
        output, kinds = request.getfixturevalue("s3").url("run"), kinds[:4]
    job = Job(tmp_path, output, images).saving()
    numbers = random.Random(f"{where} 7")
    hits = [kill_once(job, kind, numbers) for kind in kinds]
    assert "a write" in hits, hits
    assert_as_if_never_killed(job, *unkilled)


POINTS = ["before the payload", "before the record", "after the record", "in retention", "at DONE"]


def kill_at(point: str, save: int) -> None:
    """In a child: SIGKILL itself at one point of the writing of the `save`-th checkpoint."""
    draw_nothing()
    write, remove = storage.write_bytes, storage.remove
    ends = {"before the payload": ".ckpt", "before the record": ".commit.json", "at DONE": "DONE"}
    ends["after the record"] = ".commit.json"
    ends["in retention"] = ".ckpt"
    left = 1 if point in ("at DONE", "in retention") else save

    def due(url: str) -> bool:
        nonlocal left
        left -= url.endswith(ends[point])
        return left == 0

    def die_writing(url: str, data: bytes) -> None:
        if point == "in retention":
            return write(url, data)
        dies = due(url)
        if dies and point != "after the record":
            os.kill(os.getpid(), signal.SIGKILL)
        write(url, data)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def die_removing(url: str) -> None:  # a payload: its record is gone already
        if point == "in retention" and due(url):
            os.kill(os.getpid(), signal.SIGKILL)
        remove(url)

    storage.write_bytes, storage.remove = die_writing, die_removing  # type: ignore[assignment]


def test_killed_at_each_point_of_a_write(images: str, unkilled, tmp_path: Path) -> None:
    """One run, killed once at every point; what is committed then is what it starts from next."""
    job = Job(tmp_path, str(tmp_path / "run"), images).saving()
    for point, newest_step in zip(POINTS, (2, 4, 8, 8, STEPS), strict=True):
        with job.start(kill_at, point, 2) as child:
            assert child.wait() == -signal.SIGKILL, child.output
        newest = job.newest()
        assert newest is not None
        assert newest.step == newest_step, point
    assert_as_if_never_killed(job, *unkilled)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert not job.half_written()
    assert len([name for name in left if name.endswith(".ckpt")]) <= 4


def stop_before_the_record(save: int) -> None:
    """In a child: SIGSTOP itself when the payload of the `save`-th checkpoint is written."""
    draw_nothing()
    write, left = storage.write_bytes, save

    def stopping(url: str, data: bytes) -> None:
        nonlocal left
        write(url, data)
        left -= url.endswith(".ckpt")
        if left == 0 and url.endswith(".ckpt"):
            os.kill(os.getpid(), signal.SIGSTOP)

    storage.write_bytes = stopping  # type: ignore[assignment]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_an_orphan_cannot_commit_after_its_successor_has_begun(
    where: str, images: str, unkilled, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two real processes: the first freezes between payload and record, the second takes over."""
    s3 = where == "s3"
    output = request.getfixturevalue("s3").url("run") if s3 else str(tmp_path / "run")
    job = Job(tmp_path, output, images).saving()
    with job.start(stop_before_the_record, 3) as orphan:
        orphan.wait_for(lambda: orphan.is_frozen)
        [payload] = [name for name in job.half_written() if name.endswith(".ckpt")]
        assert "-00001-" in payload, "of the first attempt"
        assert_as_if_never_killed(job, *unkilled)
        finished = sorted(job.sizes())
        orphan.signal(signal.SIGCONT)
        assert orphan.wait(60) == 75
        assert "has taken over" in orphan.output
        assert "Traceback" not in orphan.output
        assert sorted(job.sizes()) == finished, "the orphan has left nothing"
    assert differences(unkilled[0], last_state(output)) == []


def dawdle_and_die(save: int) -> None:
    """In a child: steps of 80 ms, writes of 0.7 s, and SIGKILL just before a record is written."""
    kill_at("before the record", save)
    write, step = storage.write_bytes, ImageClassifier.training_step

    def slow_write(url: str, data: bytes) -> None:
        if url.endswith(".ckpt"):
            time.sleep(0.7)
        write(url, data)

    def slow_step(*arguments: Any) -> Any:
        time.sleep(0.08)
        return step(*arguments)

    storage.write_bytes, ImageClassifier.training_step = slow_write, slow_step  # type: ignore


def test_seconds_bound_what_is_lost(images: str, tmp_path: Path) -> None:
    """The worst moment: a save is all but committed, so what counts is the one before it."""
    flags = ["--run.checkpoint_every_s=1", "--data.global_batch_size=1"]
    job = Job(tmp_path, str(tmp_path / "run"), images, flags)
    with job.start(dawdle_and_die, 2) as child:
        assert child.wait(60) == -signal.SIGKILL, child.output
        newest, times_s = job.newest(), child.times_s()
    assert newest is not None
    assert 3 < newest.step < len(times_s) - 2 < 48, "within the first epoch, some steps later"
    lost_s = times_s[-1] - times_s[newest.step]
    assert lost_s < 1.5, "the bound and a step at most, though writes are slower than half of it"
