"""SIGTERM and Ctrl-C: the step in hand is done and saved, 143; nothing is lost, nothing hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightship.data.module import ImageData
from lightship.data.sources.listing import Listing
from lightship.models.classifier import ImageClassifier
from lightship.run.folder import RunFolder
from lightship.training.callbacks.checkpointing import Checkpointing
from tests.support.killing import STEPS, Job, assert_as_if_never_killed, draw_nothing, many_images
from tests.support.runs import last_state

FLAGS = ["--data.eval_batch_size=16", "--model.ema_decay=0.9"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return many_images(str(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def undisturbed(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    path = tmp_path_factory.mktemp("undisturbed")
    job = Job(path, str(path / "run"), images, FLAGS)
    return job.finish(), last_state(job.output)


def signal_in(owner: Any, name: str, call: int, signals: list[int], wait_s: float = 0) -> None:
    """In a child: send itself signals in the `call`-th call of `owner.name`, then wait."""
    draw_nothing()
    function = getattr(owner, name)
    left = call

    def signalling(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            for number in signals:
                os.kill(os.getpid(), number)
            time.sleep(wait_s)
        return function(*args, **kwargs)

    setattr(owner, name, signalling)


# Where the signal comes, and the optimizer steps that must be saved by then.
MOMENTS: dict[str, tuple[tuple[Any, str, int], int]] = {
    "listing the images": ((Listing, "__init__", 1), 0),
    "decoding": ((ImageData, "prepare", 2), 0),
    "building the model": ((ImageClassifier, "__init__", 1), 0),
    "beginning to train": ((Checkpointing, "on_train_start", 1), 0),
    "first step": ((ImageClassifier, "training_step", 1), 1),
    "a step": ((ImageClassifier, "training_step", 5), 5),
    "last step but one of an epoch": ((ImageClassifier, "training_step", 7), 7),
    "last step of an epoch": ((ImageClassifier, "training_step", 8), 8),
    "a validation": ((ImageClassifier, "validation_step", 2), 8),
    "a validation's end": ((ImageClassifier, "on_validation_epoch_end", 2), 16),
    "an epoch's end": ((Checkpointing, "on_train_epoch_end", 2), 16),
    "last step of all": ((ImageClassifier, "training_step", STEPS), STEPS),
    "last validation": ((ImageClassifier, "validation_step", 3 * 4), STEPS),
    "the test": ((ImageClassifier, "test_step", 1), STEPS),
    "the end": ((RunFolder, "mark_done", 1), STEPS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_signal_loses_nothing(moment: str, images: str, undisturbed, tmp_path: Path) -> None:
    where, saved_steps = MOMENTS[moment]
    number = [signal.SIGTERM, signal.SIGINT][list(MOMENTS).index(moment) % 2]
    job = Job(tmp_path, str(tmp_path / "run"), images, list(FLAGS))
    with job.start(signal_in, *where, [number]) as child:
        assert child.wait(60) == 143, child.output
        assert "Traceback" not in child.output
        assert len([li for li in child.output.splitlines() if li.startswith("lightship: ")]) == 1
        assert f"stopped by {number.name}" in child.output
        assert "rerun" in child.output
        assert len(child.steps()) == saved_steps, "the step in hand is the last"
    newest = job.newest()
    assert (newest.step if newest else 0) == saved_steps
    if saved_steps:
        assert newest is not None
        assert not job.half_written()
    ids, state = undisturbed
    assert_as_if_never_killed(job, state, ids)


def test_a_signal_while_a_checkpoint_is_written(images: str, undisturbed, tmp_path: Path) -> None:
    """From outside, in whatever step it comes: that step is saved, as is the write in flight."""
    job = Job(tmp_path, str(tmp_path / "run"), images, list(FLAGS)).saving()
    with job.start() as child:
        child.wait_for(job.half_written)
        child.signal(signal.SIGTERM)
        assert child.wait(60) == 143, child.output
        newest = job.newest()
        assert newest is not None
        assert newest.step == len(child.steps()) > 0
    ids, state = undisturbed
    assert_as_if_never_killed(job, state, ids)


def test_a_validation_that_ends_a_run_bounded_by_steps_is_finished(
    images: str, tmp_path: Path
) -> None:
    """Lightning would not come back to it: so it is not left."""
    flags = [*FLAGS, "--trainer.max_steps=8"]
    whole = Job(tmp_path / "1", str(tmp_path / "1" / "run"), images, flags)
    whole.finish()
    job = Job(tmp_path / "2", str(tmp_path / "2" / "run"), images, flags)
    with job.start(signal_in, ImageClassifier, "validation_step", 1, [signal.SIGTERM]) as child:
        assert child.wait(60) == 143
    job.finish()
    assert last_state(job.output)["DONE"] == last_state(whole.output)["DONE"]


def test_a_second_ctrl_c_means_now(images: str, undisturbed, tmp_path: Path) -> None:
    job = Job(tmp_path, str(tmp_path / "run"), images, list(FLAGS)).saving()
    where: tuple[Any, str, int] = (ImageClassifier, "training_step", 6)
    with job.start(signal_in, *where, [signal.SIGINT], 600.0) as child:
        child.wait_for(lambda: len(child.steps()) == 5)
        time.sleep(0.2)
        assert child.process.is_alive(), "once is not now"
        child.signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert "Traceback" not in child.output
        assert len(child.steps()) == 5
    ids, state = undisturbed
    assert_as_if_never_killed(job, state, ids)


def test_both_signals_in_one_step_are_one_request(images: str, tmp_path: Path) -> None:
    job = Job(tmp_path, str(tmp_path / "run"), images, list(FLAGS))
    signals = [signal.SIGTERM, signal.SIGTERM]
    with job.start(signal_in, ImageClassifier, "training_step", 3, signals) as child:
        assert child.wait(60) == 143
    newest = job.newest()
    assert newest is not None
    assert newest.step == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightship", "fit", f"--run.output={tmp_path}/run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "loading PyTorch" in process.stderr.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in told
    assert f"stopped by {number.name}" in told


def test_handlers_are_given_back(tmp_path: Path) -> None:
    """To who calls lightship from Python."""
    before: list[Callable | int | None] = [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    ]
    from lightship import cli

    assert cli.main(["fit", f"--data.root={tmp_path}/none", f"--run.output={tmp_path}/run"]) == 65
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
