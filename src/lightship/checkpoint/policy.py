"""How much training a kill may cost: when a save is due, and when training must wait for one."""

import time
from dataclasses import dataclass, field


@dataclass
class CheckpointPolicy:
    """Keeps what a kill would lose within so many steps and so many seconds of training.

    A save begins at half the bound and is written while training goes on; where it is not durable
    yet when the whole bound has passed since the last that is, training waits for it. So a save
    that takes less than half the bound costs no wait, and one that takes longer loses no more.

    Args:
        steps: Optimizer steps that may be lost; None: any number.
        seconds: Seconds of training that may be lost, a step (and what several ranks take to
            agree) on top; None: any number.
    """

    steps: int | None
    seconds: float | None
    _begun: tuple[int, float] = field(default=(0, 0.0), init=False)
    _durable: tuple[int, float] = field(default=(0, 0.0), init=False)

    def start(self, step: int) -> None:
        """Training begins here: what came before is durable, or there is nothing."""
        self._begun = self._durable = step, time.monotonic()

    def save_begun(self, step: int) -> None:
        """A save of this step has begun; with one in flight at most, that before it is durable."""
        self._durable, self._begun = self._begun, (step, time.monotonic())

    def save_durable(self) -> None:
        """No save is in flight."""
        self._durable = self._begun

    @property
    def begun_step(self) -> int:
        """Step of the newest save, durable or not."""
        return self._begun[0]

    def is_due(self, step: int) -> bool:
        """Whether the steps ask for a save; the same steps whatever came before."""
        return self.steps is not None and step % ((self.steps + 1) // 2) == 0

    def is_late(self) -> bool:
        """Whether the clock of this process asks for a save."""
        return self.seconds is not None and time.monotonic() - self._begun[1] >= self.seconds / 2

    def is_reached(self, step: int) -> bool:
        """Whether no further step may be taken before the save in flight is durable."""
        steps, at_s = self._durable
        return (self.steps is not None and step - steps >= self.steps) or (
            self.seconds is not None and time.monotonic() - at_s >= self.seconds
        )
