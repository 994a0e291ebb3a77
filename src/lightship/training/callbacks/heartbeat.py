"""A file for liveness probes: its modification time is that of the last batch."""

import os
from pathlib import Path
from time import monotonic, time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightship.distributed.liveness import MAX_SILENCE_S, MAX_START_S, VARIABLE
from lightship.errors import ConfigError

_EVERY_S = 1.0
START_GRACE_S = MAX_START_S - MAX_SILENCE_S
"""Added to the liveness probe's bound for a restart."""


def begin_again() -> None:
    """Set the file's time ahead after a restart in the same pod, which may take as long as a start.

    The startup probe does not run again, and the liveness probe would count from the last batch
    before the restart. Every rank, when its process starts.
    """
    path = Path(os.environ.get(VARIABLE) or os.devnull)
    if path.is_file():
        ahead_s = time() + START_GRACE_S
        os.utime(path, (ahead_s, ahead_s))


def build_heartbeat() -> list["Heartbeat"]:
    """The callback, if LIGHTSHIP_HEARTBEAT_FILE is set.

    Raises:
        ConfigError: Its folder does not exist or is not writable.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return []
    folder = Path(named).absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{VARIABLE} is {named}: {folder} is not a writable folder")
    return [Heartbeat(Path(named))]


class Heartbeat(Callback):
    """Touches a file after every batch of any kind, at most once a second.

    A liveness probe compares the file's time with the current time in a shell, without Python. The
    file exists after the first batch. All ranks of a node touch the same file: one that hangs stops
    the others at their next collective. Waits neither for the device nor for other ranks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched_s = float("-inf")

    def beat(self) -> None:
        """Touch the file, at most once a second."""
        now = monotonic()
        if now - self._touched_s >= _EVERY_S:
            self._touched_s = now
            self.path.touch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """After each batch."""
        self.beat()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end
