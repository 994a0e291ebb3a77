"""What the checks share: the settings, and facts that are computed once for all of them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cached_property, partial
from threading import Lock
from typing import Any, TypeVar

from lightship.config import Config
from lightship.distributed import launcher
from lightship.errors import ConfigError
from lightship.storage.parallel import in_daemon

T = TypeVar("T")


class Context:
    """One run of the doctor. For any thread.

    Args:
        config: Settings of the fit to check.
        invalid: Why they are invalid; empty if they are valid.
        is_worker: Whether a launcher started this process as one of several.
        load: Imports all that a fit imports, at once, on one thread: large packages that import
            each other on several threads may see one another half initialised.
    """

    def __init__(
        self, config: Config, invalid: str, is_worker: bool, load: Callable[[], None]
    ) -> None:
        self.config, self.invalid, self.is_worker = config, invalid, is_worker
        self.started_s = time.monotonic()
        self.loaded = in_daemon(load)
        self._lock = Lock()
        self._facts: dict[Callable[[Context], Any], Future[Any]] = {}

    def start(self, compute: Callable[["Context"], T]) -> "Future[T]":
        """`compute(self)`, on a thread of its own since the first call. Does not block."""
        with self._lock:
            if compute not in self._facts:
                self._facts[compute] = in_daemon(partial(compute, self))
            return self._facts[compute]

    def once(self, compute: Callable[["Context"], T]) -> T:
        """`compute(self)`, computed once for all callers. Blocks; raises what it raises."""
        return self.start(compute).result()

    def left_s(self, deadline_s: float) -> float:
        """Seconds until `deadline_s` after the start, at least 0."""
        return max(0.0, self.started_s + deadline_s - time.monotonic())

    def is_known(self, future: "Future[Any]", deadline_s: float) -> bool:
        """Whether the future is done within `deadline_s` of the start. Blocks until then."""
        return bool(wait([future], self.left_s(deadline_s)).done)

    @cached_property
    def processes(self) -> int:
        """Processes of the fit on this node. Needs the imports. Raises ConfigError."""
        if self.is_worker:
            return int(os.environ["LOCAL_WORLD_SIZE"])
        return 1 if self.config.trainer.is_on_tpu else launcher.processes_here(self.config.trainer)

    @property
    def processes_or_one(self) -> int:
        """The same; 1 where that fails, which the check `GPUs` reports."""
        try:
            return self.processes
        except ConfigError:
            return 1

    @cached_property
    def on_gpus(self) -> bool:
        """Whether each process drives a GPU. Needs the imports."""
        return launcher.is_on_gpus(self.config.trainer.accelerator)
