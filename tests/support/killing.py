"""A job that is killed again and again, and what must hold after each kill and at the end."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightship import storage
from lightship.checkpoint.record import Commit
from lightship.checkpoint.store import CheckpointStore
from tests.support.forked import Child, lightship
from tests.support.images import little_set, put
from tests.support.runs import differences, last_state

Ids = dict[tuple[int, int], list[int]]
SAVE_EVERY_STEPS = 3
STEPS = 32


def draw_nothing() -> None:
    """In a child: no pictures in the report, which are most of so short a run's time."""
    from lightship.commands import fit

    fit.write_report = lambda *_: None  # type: ignore[assignment]


def features_in_small_parts(stops: bool = False) -> None:
    """In a child: features of 4 images at a time, in parts of 8.

    Args:
        stops: The pass goes no further than the first part that is written.
    """
    from lightship.data import feature_store
    from lightship.training import features

    draw_nothing()
    features._BATCH = 4
    feature_store.ROWS, feature_store._AT_ROWS = 8, (slice(None, 8), slice(8, None))
    append = feature_store.FeatureStore.append

    def stopping(self: feature_store.FeatureStore, rows: feature_store.Rows) -> None:
        append(self, rows)
        if self._parts:
            time.sleep(600)

    if stops:
        feature_store.FeatureStore.append = stopping  # type: ignore[method-assign]


@dataclass
class Job:
    """The same command again and again, on one output.

    Attributes:
        folder: For traces and printed lines.
        output: URL of the run.
        root: URL of the images (see `many_images`).
        flags: More flags.
        env: More environment.
        prepare: What a child calls first, unless its start names another.
    """

    folder: Path
    output: str
    root: str
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[..., None] = draw_nothing

    def start(
        self, prepare: Callable[..., None] | None = None, *args: Any
    ) -> AbstractContextManager[Child]:
        arguments = [
            "fit", f"--data.root={self.root}", f"--run.output={self.output}",
            "--run.tracking=none", "--run.log_images=2", "--model.net=tests.support.own_nets:bulky",
            "--data.global_batch_size=6", "--data.flip=true", "--optim.name=adamw",
            "--optim.lr=0.01", "--trainer.max_epochs=4", "--trainer.log_every_n_steps=5",
            "--trainer.early_stopping_patience=9", *self.flags,
        ]  # fmt: skip
        return lightship(arguments, self.folder, self.env, prepare or self.prepare, args)

    def saving(self) -> "Job":
        """The same with a save every few steps."""
        self.flags.append(f"--run.checkpoint_every_steps={SAVE_EVERY_STEPS}")
        return self

    def finish(self) -> Ids:
        """Run to the end, unhindered; the samples of each step of all starts so far."""
        with self.start() as child:
            code = child.wait()
            assert code == 0, child.output
            return child.ids_of_parts()

    def sizes(self) -> dict[str, int]:
        """What is in the folder of checkpoints just now, a local write's temporary included."""
        if storage.is_remote(self.output):
            try:
                files = storage.list_files(f"{self.output}/checkpoints")
            except storage.NotFound:
                return {}
            return {file.path: file.size_bytes for file in files}
        sizes = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder_path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    @property
    def folder_path(self) -> Path:
        """Of the checkpoints of a local output."""
        return Path(self.output, "checkpoints")

    def half_written(self) -> list[str]:
        """Temporaries of payloads (too large for anything else's), payloads without a record."""
        sizes = self.sizes()
        return [
            name
            for name, size in sizes.items()
            if (name.endswith("tmp") and size > 100_000)
            or (name.endswith(".ckpt") and f"{name[:-5]}.commit.json" not in sizes)
        ]

    def newest(self) -> Commit | None:
        return CheckpointStore(f"{self.output}/checkpoints").newest()


def many_images(url: str) -> str:
    """48 for training: 8 steps an epoch."""
    return put(url, little_set(("train", "val", "test"), per_class=16))


def kill_once(job: Job, kind: str, random_numbers: random.Random) -> str:
    """Start the job and SIGKILL it: at a "random" moment, or "in a write" of a checkpoint.

    Returns:
        What the kill hit: "a write" if it left a half-written checkpoint, "the start", "training"
        or "the end".

    Raises:
        AssertionError: More steps were lost than the set interval.
    """
    newest, old = job.newest(), set(job.half_written())
    steps = random_numbers.randrange(min(10, STEPS - (newest.step if newest else 0) + 2))
    writes, delay_s = random_numbers.randrange(1, 4), random_numbers.random() / 20
    seen = set(old)

    with job.start() as child:
        begun_before = len(child.steps())

        def is_time() -> bool:
            nonlocal writes
            if kind == "random":
                return len(child.steps()) - begun_before >= steps
            new = set(job.half_written()) - seen
            seen.update(new)
            writes -= bool(new)
            return bool(new) and writes <= 0

        ends = time.monotonic() + 60
        while child.process.is_alive() and not is_time():
            assert time.monotonic() < ends, child.output
        if kind == "random":
            time.sleep(delay_s)
        if child.process.is_alive():
            child.signal(signal.SIGKILL)
        code = child.wait(30)
        assert code in (0, -signal.SIGKILL), child.output
        assert_little_is_lost(job, newest, child.steps()[begun_before:])
        if set(job.half_written()) - old:
            return "a write"
        trained = len(child.steps()) > begun_before
        return "the end" if code == 0 else "training" if trained else "the start"


def kill_at_step(job: Job, step: int) -> tuple[int, int]:
    """Start the job and SIGKILL it once it has begun a step.

    Returns:
        (newest checkpoint's step, last step that was begun).
    """
    newest = job.newest()
    with job.start() as child:
        begun_before = len(child.steps())

        def begun() -> list[tuple[int, list[int]]]:
            return child.steps()[begun_before:]

        child.wait_for(lambda: begun() and begun()[-1][0] >= step)
        child.kill()
        assert child.process.exitcode == -signal.SIGKILL, child.output
        assert_little_is_lost(job, newest, begun())
        saved = job.newest()
        return saved.step if saved else 0, begun()[-1][0]


def kill_in_features(job: Job) -> list[str]:
    """Start the job and SIGKILL it within the pass over the images that gives the head's features.

    Returns:
        Names of the parts that it has left.
    """

    def parts() -> list[str]:
        return [path.name for path in Path(job.output, "features", "train").glob("*.npz")]

    with job.start(features_in_small_parts, True) as child:
        child.wait_for(parts)
        child.kill()
        assert child.process.exitcode == -signal.SIGKILL, child.output
        assert not child.steps(), "the head is fitted before the first step"
    return parts()


def assert_little_is_lost(
    job: Job, before: Commit | None, begun: list[tuple[int, list[int]]]
) -> None:
    """After a start that began these steps: nothing committed, and the set interval at most."""
    newest = job.newest()
    saved_steps = newest.step if newest else 0
    assert saved_steps >= (before.step if before else 0)
    lost = begun[-1][0] + 1 - saved_steps if begun else 0
    assert lost <= SAVE_EVERY_STEPS, f"{lost} steps are lost"


def assert_as_if_never_killed(job: Job, expected: dict[str, Any], ids: Ids) -> None:
    """Finish the job; state, metrics, results and every step's samples are those expected."""
    assert job.finish() == ids
    assert differences(expected, last_state(job.output)) == []
