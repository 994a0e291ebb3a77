"""Training on an S3 that fails: the same weights, or exit 74 with all that was committed safe."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightship import storage
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from tests.support.faults import FaultProxy
from tests.support.forked import Child
from tests.support.killing import (
    SAVE_EVERY_STEPS,
    Job,
    assert_as_if_never_killed,
    draw_nothing,
    many_images,
)
from tests.support.runs import last_state
from tests.support.s3 import S3Server

DEADLINE_S = 6.0
LITTLE = ["--model.net=tests.support.own_nets:moody"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    path = tmp_path_factory.mktemp("undisturbed")
    job = Job(path, str(path / "run"), many_images(str(path / "images")), list(LITTLE))
    ids = job.finish()
    return last_state(job.output), ids


@pytest.fixture(scope="module")
def images(s3: S3Server) -> str:
    return many_images(s3.url("images"))


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def job(s3: S3Server, proxy: FaultProxy, images: str, tmp_path: Path) -> Job:
    """Reads and writes through the proxy; this process looks at the server itself."""
    env = {
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "LIGHTSHIP_STORAGE_DEADLINE_S": str(DEADLINE_S),
    }
    return Job(tmp_path, s3.url("run"), images, list(LITTLE), env).saving()


BOTH = ("GET", "PUT", "HEAD")


@pytest.mark.parametrize("fault", ["status", "reset", "stall", "short", "long"])
def test_faults_that_pass_change_nothing(
    fault: str, job: Job, proxy: FaultProxy, undisturbed
) -> None:
    """A burst while images are read, and one while checkpoints are written."""
    times = 1 if fault == "stall" else 3  # each silence costs a third of the deadline
    methods = ("GET",) if fault in ("short", "long") else BOTH
    if fault in ("status", "reset"):
        methods = (*BOTH, "DELETE")
    proxy.plan(fault, times, methods, after=20)
    with job.start() as child:
        child.wait_for(lambda: len(child.steps()) > 4)
        assert proxy.times == 0, "the first burst has hit"
        proxy.plan(fault, times, methods, path="checkpoints")
        assert child.wait(120) == 0, child.output
        assert proxy.times == 0, "the second burst has hit"
    state, ids = undisturbed
    assert_as_if_never_killed(job, state, ids)


@pytest.mark.parametrize("fault", ["status", "stall"])
def test_an_outage_that_stays_ends_in_74_and_loses_nothing_committed(
    fault: str, job: Job, proxy: FaultProxy, undisturbed
) -> None:
    with job.start() as child:
        child.wait_for(lambda: len(child.steps()) > 8)
        proxy.plan(fault, methods=BOTH)
        began_s = time.monotonic()
        assert child.wait(60) == 74, child.output
        assert time.monotonic() - began_s < 10 * DEADLINE_S, "within its bound"
        assert_told(child, f"no success within {DEADLINE_S:.0f}")
        begun = len(child.steps())
    newest = job.newest()
    assert newest is not None
    assert begun - newest.step <= SAVE_EVERY_STEPS
    proxy.clear()
    state, ids = undisturbed
    assert_as_if_never_killed(job, state, ids)


def fail_a_save() -> None:
    """In a child: steps of 50 ms, and a disk that is full when the first payload is written."""
    draw_nothing()
    write, step = storage.write_bytes, ImageClassifier.training_step

    def full(url: str, data: bytes) -> None:
        if url.endswith(".ckpt"):
            raise ConfigError(f"{url}: no space left")
        write(url, data)

    def slow_step(*arguments: Any) -> Any:
        time.sleep(0.05)
        return step(*arguments)

    storage.write_bytes, ImageClassifier.training_step = full, slow_step  # type: ignore


def test_a_failed_save_ends_the_run_at_the_next_step(
    images: str, s3: S3Server, tmp_path: Path
) -> None:
    """Not at the next save, 10 steps on."""
    flags = [*LITTLE, "--data.global_batch_size=1", "--run.checkpoint_every_steps=20"]
    with Job(tmp_path, s3.url("run"), images, flags).start(fail_a_save) as child:
        assert child.wait(60) == 78
        assert_told(child, "no space left")
        assert 10 <= len(child.steps()) <= 13


def test_a_stop_whose_save_fails_does_not_claim_to_have_saved(
    images: str, s3: S3Server, tmp_path: Path
) -> None:
    flags = [*LITTLE, "--data.global_batch_size=1"]
    with Job(tmp_path, s3.url("run"), images, flags).start(fail_a_save) as child:
        child.wait_for(lambda: len(child.steps()) > 2)
        child.signal(signal.SIGTERM)
        assert child.wait(60) == 78
        assert_told(child, "no space left")
        assert len(child.steps()) < 9


def assert_told(child: Child, text: str) -> None:
    """In a line or two, and no traceback."""
    assert "Traceback" not in child.output
    [line] = [line for line in child.output.splitlines() if line.startswith("lightship: ")]
    assert text in line


class TestWrongBytesOfTheRightLength:
    @pytest.fixture
    def half_way(self, job: Job) -> int:
        """Steps in the newest checkpoint of a killed run."""
        with job.start() as child:
            child.wait_for(lambda: len(child.steps()) > 14)
            child.kill()
        newest = job.newest()
        assert newest is not None
        return newest.step

    @pytest.mark.parametrize("fault", ["flip", "flip told"])
    def test_on_the_way_once(
        self, fault, half_way, job: Job, proxy: FaultProxy, undisturbed
    ) -> None:
        proxy.plan(fault, 1, path=".ckpt")
        with job.start() as child:
            assert child.wait() == 0, child.output
            assert f"from step {half_way}" in child.output
            assert proxy.times == 0
        state, ids = undisturbed
        assert_as_if_never_killed(job, state, ids)

    @pytest.mark.parametrize("fault", ["flip", "flip told"])
    def test_of_the_newest_for_good(
        self, fault, half_way, job: Job, proxy: FaultProxy, undisturbed
    ) -> None:
        newest = job.newest()
        assert newest is not None
        proxy.plan(fault, path=newest.file)
        with job.start() as child:
            assert child.wait() == 0, child.output
            assert f"checkpoint {newest.file} does not match " in child.output
            assert "using the previous checkpoint" in child.output
            assert f"from step {half_way}" not in child.output
            assert ", from step " in child.output
        state, ids = undisturbed
        assert_as_if_never_killed(job, state, ids)
