"""Being asked to stop: a signal sets a flag, and the ranks agree on it at a step boundary."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lightship.exits import Preempted


class StopRequest:
    """Whether somebody asked this process to stop.

    The first SIGTERM or SIGINT sets a flag and does nothing else: a handler runs between any two
    bytecodes, where neither a collective nor a save is safe. A second SIGINT means now.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Take over SIGTERM and SIGINT (main thread only; elsewhere there is nothing to take)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def raise_if_set(self, saved: str) -> None:
        """Raise Preempted where nothing needs saving. `saved` says what state is safe."""
        if self:
            raise Preempted(f"stopped by {self.signal_name}; {saved}")


class Agreement:
    """Flags that any rank may raise and all ranks act on at the same step.

    One small all-reduce on a group of its own every `every_steps` steps, on the CPU (gloo), so that
    the device's stream is not touched; with one process, no communication at all.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._group: Any = None

    def open(self) -> None:
        """Make the group. Called on every rank before training. Blocks for the others."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def any_rank(self, step: int, *flags: bool) -> list[bool]:
        """Each flag as any rank has it; all False on steps where nobody asks."""
        if self._group is None:
            return list(flags)
        if step % self.every_steps:
            return [False] * len(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]
