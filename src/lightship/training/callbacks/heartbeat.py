"""A sign of life for whoever watches from outside: a file whose time is that of the last batch."""

import os
from pathlib import Path
from time import monotonic, time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightship.errors import ConfigError

VARIABLE = "LIGHTSHIP_HEARTBEAT_FILE"
_EVERY_S = 1.0
START_GRACE_S = 1800
"""Added to the probe's bound for a restart: the bound of a start (k8s/base/job.yaml) is longer."""


def begin_again() -> None:
    """Date the file of an earlier process ahead, so that a restart has as long as a first start.

    The startup probe has succeeded by then and does not run again; the liveness probe would count
    from the last batch before the restart. Every rank, when its process starts.
    """
    path = Path(os.environ.get(VARIABLE) or os.devnull)
    if path.is_file():
        ahead_s = time() + START_GRACE_S
        os.utime(path, (ahead_s, ahead_s))


def build_heartbeat() -> list["Heartbeat"]:
    """The callback, where LIGHTSHIP_HEARTBEAT_FILE names a file; nothing elsewhere.

    Raises:
        ConfigError: There is no such folder, or it cannot be written.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return []
    folder = Path(named).absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{VARIABLE} is {named}: {folder} is no folder that can be written")
    return [Heartbeat(Path(named))]


class Heartbeat(Callback):
    """Touches a file after every batch of any kind, at most once a second.

    A liveness probe compares the file's time with now, which takes a shell and no Python. It is
    there once the first batch is done. Every rank of a node touches the same file: one that hangs
    stops the others at their next exchange. Waits neither for the device nor for other ranks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._touched_s = float("-inf")

    def beat(self) -> None:
        """Touch the file, unless that was done within the last second."""
        now = monotonic()
        if now - self._touched_s >= _EVERY_S:
            self._touched_s = now
            self.path.touch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """A batch is trained."""
        self.beat()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end
