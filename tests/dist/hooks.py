"""What a process under test does beside its work, such as writing down the ids it trains on."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightship.checkpoint import store
from lightship.commands import fit as run
from lightship.commands import predict
from lightship.commands.base import Command
from lightship.data.batch import Batch
from lightship.distributed import comm, elastic_agent
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.head import Head
from lightship.run import folder
from lightship.training import fast_loop


def _note_batches(method: str, file_name: str) -> None:
    """Append {rank, world, step, ids} of each batch to a file, and take TEST_STEP_S longer.

    Until there is a file `hurry` in TEST_FOLDER.
    """
    theirs, step_s = getattr(ImageClassifier, method), float(os.environ["TEST_STEP_S"])
    hurry = Path(os.environ["TEST_FOLDER"], "hurry")

    def noted(self: ImageClassifier, batch: Batch, batch_idx: int) -> Any:
        line = {
            "rank": self.trainer.global_rank,
            "world": self.trainer.world_size,
            "step": self.trainer.global_step,
            "ids": batch.ids.tolist(),
        }
        with Path(os.environ["TEST_FOLDER"], file_name).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not hurry.exists():
            time.sleep(step_s)
        return theirs(self, batch, batch_idx)

    setattr(ImageClassifier, method, noted)


def plain() -> None:
    """Note each training step in TEST_FOLDER/ids, and those of the fast loop in fast-RANK."""
    _note_batches("training_step", "ids")
    _note_fast_steps()


def _note_fast_steps() -> None:
    theirs, folder = fast_loop._Steps._take_one, os.environ["TEST_FOLDER"]

    def noted(self: fast_loop._Steps) -> bool:
        with Path(folder, f"fast-{self.trainer.global_rank}").open("a") as file:
            file.write(f"{self.trainer.global_step}\n")
        return theirs(self)

    fast_loop._Steps._take_one = noted


def _kill_agent(*_: Any) -> None:
    """End this worker's agent, and the worker with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def killed_at_the_end() -> None:
    """As `plain`; what rank 0 does alone, after the others, ends it and its agent."""
    plain()
    run._finish = predict._finish = _kill_agent


def _before(name: str, act: Callable[[], None]) -> None:
    """Do something before the agent calls a method of its own."""
    theirs = getattr(elastic_agent._Agent, name)

    def both(self: Any, *arguments: Any) -> Any:
        act()
        return theirs(self, *arguments)

    setattr(elastic_agent._Agent, name, both)


def killed_after_joining() -> None:
    """The agent is killed when all have joined, before it tells the others of its workers."""
    _before("_assign_worker_ranks", lambda: os.kill(os.getpid(), signal.SIGKILL))


def frozen_after_joining() -> None:
    """As `killed_after_joining`, but the agent is frozen."""
    _before("_assign_worker_ranks", lambda: os.kill(os.getpid(), signal.SIGSTOP))


def frozen_at_the_end() -> None:
    """As `plain`; the agent is frozen when its worker has finished."""
    plain()
    frozen = Path(os.environ["TEST_FOLDER"], "frozen")
    _before("_exit_barrier", lambda: (frozen.touch(), os.kill(os.getpid(), signal.SIGSTOP)))


def late_at_the_end() -> None:
    """As `plain`; the agent has finished after another is frozen, and waits 2 s for it."""
    plain()
    frozen, agent = Path(os.environ["TEST_FOLDER"], "frozen"), elastic_agent.LocalElasticAgent

    def wait() -> None:
        while not frozen.exists():
            time.sleep(0.05)

    _before("_exit_barrier", wait)
    elastic_agent.LocalElasticAgent.__init__ = partialmethod(agent.__init__, exit_barrier_timeout=2)


class CountCollectives(Callback):
    """Profiles the steps from `first` up to `last` and writes what gloo did to TEST_FOLDER."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.done = first, last, False
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.first and not self.profile.profiler:
            self.profile.start()
        elif trainer.global_step == self.last and not self.done:
            self.done = True
            self.profile.stop()
            counts: dict[str, int] = {}
            for event in self.profile.events():
                if event.name.startswith("c10d::"):
                    counts[event.name] = counts.get(event.name, 0) + 1
            ddp = trainer.strategy.model
            buckets = len(ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))
            told = {"steps": self.last - self.first, "buckets": buckets, "counts": counts}
            path = Path(os.environ["TEST_FOLDER"], f"collectives-{trainer.global_rank}")
            path.write_text(json.dumps(told))


def counting() -> None:
    """Count the collectives of the quiet steps 9 to 14 (agreements are at 8 and 16)."""
    build = run.build_trainer

    def with_counter(config, callbacks, *rest):  # type: ignore[no-untyped-def]
        return build(config, [CountCollectives(9, 14), *callbacks], *rest)

    run.build_trainer = with_counter


def stock() -> None:
    """In place of lightship's fit: the same net and batches by Lightning's Trainer as it comes."""

    def fit(command: Command) -> None:
        torch.manual_seed(0)
        classes, size_px = ["a", "b", "c"], 8
        model = ImageClassifier("tests.dist.nets:large", classes, size_px, [0.5] * 3, [0.25] * 3)
        batches = [
            Batch(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3, i)
            for i in torch.arange(6 * 20).split(6)
        ]
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            max_epochs=1,
            default_root_dir=os.environ["TEST_FOLDER"],
            callbacks=[CountCollectives(9, 14)],
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))

    run.fit = fit


def late() -> None:
    """Come to the others late: until then nobody listens to signals."""
    init_process_group = comm.init_process_group

    def slow(*arguments: Any) -> None:
        time.sleep(2)
        init_process_group(*arguments)

    comm.init_process_group = slow


def impatient() -> None:
    """Wait a second for an output to be seen, as on a file system that is no NFS."""
    folder._SEEN_WITHIN_S = 1.0


def slow_checkpoints() -> None:
    """Each is written, and read by the ranks that did not choose it, later than timeout_s (3)."""

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **how: Any) -> Any:
            time.sleep(6)
            return function(*arguments, **how)

        return called

    store.CheckpointStore._write = late(store.CheckpointStore._write)  # type: ignore[method-assign]
    store.read_checkpoint = late(store.read_checkpoint)


def validating() -> None:
    """Note each batch of a validation in TEST_FOLDER/validated."""
    _note_batches("validation_step", "validated")


def predicting() -> None:
    """Note each batch predicted in TEST_FOLDER/predicted."""
    _note_batches("predict_step", "predicted")


def refusing() -> None:
    """On rank 1 the head is not the last operation."""
    check = Head.check

    def refused(self: Head, pixels: torch.Tensor) -> None:
        check(self, pixels)
        if not comm.is_rank_0():
            raise ConfigError("rank 1 refuses the head")

    Head.check = refused
