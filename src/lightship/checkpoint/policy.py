"""When a checkpoint is due, and when training must block on one: the bound on lost training."""

import time
from dataclasses import dataclass, field


@dataclass
class CheckpointPolicy:
    """Bounds the training that a crash loses, in steps and in seconds.

    A save starts at half the bound and is written in the background. If it is not durable when the
    whole bound has passed since the last durable one, training blocks on it. So a save that takes
    less than half the bound never blocks, and a slower one does not raise the loss.

    Args:
        steps: Max optimizer steps lost; None: unbounded.
        seconds: Max seconds of training lost, plus one step (and the steps until all ranks agree);
            None: unbounded.
    """

    steps: int | None
    seconds: float | None
    _begun: tuple[int, float] = field(default=(0, 0.0), init=False)
    _durable: tuple[int, float] = field(default=(0, 0.0), init=False)
    _durable_for_all: int = field(default=0, init=False)

    def start(self, step: int) -> None:
        """Training starts at `step`, which is durable (or 0)."""
        self._begun = self._durable = step, time.monotonic()
        self._durable_for_all = step

    def save_begun(self, step: int) -> None:
        """A save of `step` has started; at most one is in flight, so the one before is durable."""
        self._durable_for_all = self._begun[0]
        self._durable, self._begun = self._begun, (step, time.monotonic())

    def save_durable(self) -> None:
        """No save of this process is in flight."""
        self._durable = self._begun

    def all_durable(self) -> None:
        """All processes know that no save is in flight."""
        self.save_durable()
        self._durable_for_all = self._begun[0]

    @property
    def begun_step(self) -> int:
        """Step of the newest save, durable or not."""
        return self._begun[0]

    def is_due(self, step: int) -> bool:
        """Whether a save is due by steps: the same steps whatever was saved before."""
        return self.steps is not None and step % ((self.steps + 1) // 2) == 0

    def is_late(self) -> bool:
        """Whether a save is due by the clock of this process."""
        return self.seconds is not None and time.monotonic() - self._begun[1] >= self.seconds / 2

    def may_be_reached(self, step: int) -> bool:
        """Whether `is_reached` by steps may hold on any process: the same answer on all of them."""
        return self.steps is not None and step - self._durable_for_all >= self.steps

    def is_reached(self, step: int) -> bool:
        """Whether the bound is reached: no further step before the save in flight is durable."""
        steps, at_s = self._durable
        return (self.steps is not None and step - steps >= self.steps) or (
            self.seconds is not None and time.monotonic() - at_s >= self.seconds
        )
