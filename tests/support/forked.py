"""lightship commands in real processes that start in no time: forked where the imports are done.

`multiprocessing`'s fork server imports torch and lightship once and uses neither; each child is a
fork of it, with its own environment and output file, and dies with the tests.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.fork_server import FORK_SERVER
from tests.support.s3 import die_with_parent


@dataclass
class Child:
    """A running command.

    Attributes:
        process: Whose `exitcode` is as the kernel tells it: -9 for a SIGKILL.
        output_path: Both of its streams.
        trace_path: A line a training step (or its part): [steps done before, batch of the epoch,
            sample ids, monotonic seconds].
    """

    process: ForkServerProcess
    output_path: Path
    trace_path: Path

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def is_frozen(self) -> bool:
        """Whether a SIGSTOP holds it (Linux)."""
        status = Path(f"/proc/{self.process.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] == "T"

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.wait(30)

    def wait(self, timeout_s: float = 240) -> int:
        """The exit code. A child that does not end within the bound is a failure."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}")
        return code

    def steps(self) -> list[tuple[int, list[int]]]:
        """(step, ids) of every training step begun, in order; all starts that share the trace."""
        return [(step, ids) for step, _, ids, _ in self._trace()]

    def ids_of_parts(self) -> dict[tuple[int, int], list[int]]:
        """Sample ids by (step, batch of the epoch); one done again must have had the same."""
        seen: dict[tuple[int, int], list[int]] = {}
        for step, batch_idx, ids, _ in self._trace():
            known = seen.setdefault((step, batch_idx), ids)
            assert known == ids, f"step {step} came with other samples"
        return seen

    def times_s(self) -> list[float]:
        """When each of these steps began."""
        return [time_s for *_, time_s in self._trace()]

    def _trace(self) -> list[tuple[int, int, list[int], float]]:
        text = self.trace_path.read_text() if self.trace_path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]  # the last may be torn

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 240) -> Any:
        """What `condition` gives once it is true; the child's end before that is a failure."""
        ends = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.is_alive(), f"ended early ({self.process.exitcode}):\n{self.output}"
            assert time.monotonic() < ends, f"not within {timeout_s} s:\n{self.output}"
            time.sleep(0.001)
        return found


@contextmanager
def lightship(
    arguments: list[str],
    folder: Path,
    env: dict[str, str] | None = None,
    prepare: Callable[..., None] | None = None,
    prepare_args: tuple[Any, ...] = (),
) -> Iterator[Child]:
    """A forked `lightship arguments`; killed at the end of the block if it still runs.

    Args:
        arguments: As on the command line.
        folder: Where output and trace go; a later child of the same folder adds to the trace.
        env: Added to this process's environment.
        prepare: Module-level function that the child calls first, with `prepare_args`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output_path = folder / f"output-{time.monotonic_ns()}.txt"
    trace_path = folder / "trace.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process = FORK_SERVER.Process(
        target=_child,
        args=(arguments, environment, str(output_path), str(trace_path), prepare, prepare_args),
        daemon=True,
    )
    process.start()
    child = Child(process, output_path, trace_path)
    try:
        yield child
    finally:
        child.kill()


def _child(
    arguments: list[str],
    environment: dict[str, str],
    output_path: str,
    trace_path: str,
    prepare: Callable[..., None] | None,
    prepare_args: tuple[Any, ...],
) -> None:
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from lightship import cli

    torch.set_num_threads(1)
    _trace_steps(trace_path)
    if "LIGHTSHIP_TEST_FORK_RANKS" in environment:
        from tests.support import forked_ranks

        forked_ranks.fork_ranks(forked_ranks.run_rank)
    if prepare is not None:
        prepare(*prepare_args)
    raise SystemExit(cli.main(arguments))


def _trace_steps(path: str) -> None:
    """Have every training step note its number and sample ids before it is done."""
    from lightship.models.classifier import ImageClassifier

    trace = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    step = ImageClassifier.training_step

    def traced(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        os.write(
            trace,
            (
                json.dumps(
                    [self.trainer.global_step, batch_idx, batch.ids.tolist(), time.monotonic()]
                )
                + "\n"
            ).encode(),
        )
        return step(self, batch, batch_idx)

    ImageClassifier.training_step = traced  # type: ignore[method-assign]
