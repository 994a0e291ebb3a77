"""Being asked to stop: a signal sets a flag, and the ranks agree on it at a step boundary."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lightship.console.streams import write_error
from lightship.distributed.signals import stop_signals
from lightship.errors import EXIT_CODES, Preempted

_SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Takes over `stop_signals` while it is entered (in the main thread; elsewhere nothing).

    Before and after training all that counts is durable, and a signal ends the process at once,
    with 143. In training (from `defer` to `act_at_once`) it sets a flag and does nothing else: a
    handler runs between any two bytecodes, where neither a collective nor a save is safe. The flag
    is acted on when the step (or the validation's batch) in hand is done, plus one save; on several
    ranks at their next agreement. A SIGINT after any other signal means now: 130, without a save.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def defer(self) -> None:
        """From here on only set the flag."""
        self._deferring = True

    def act_at_once(self) -> None:
        """From here on end the process, which has nothing to save any more.

        Raises:
            Preempted: The flag is set already.
        """
        self._deferring = False
        if self:
            raise Preempted(
                f"stopped by {self.signal_name}: training is done and saved; run the same command "
                "to test it"
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self:
            _leave("stopped at once: what is not saved yet is lost", 130)
        if not self._deferring:
            name = signal.Signals(number).name
            _leave(
                f"stopped by {name}: nothing is lost; run the same command to go on",
                EXIT_CODES["preempted"].code,
            )
        self.signal_name = self.signal_name or signal.Signals(number).name


def _leave(text: str, code: int) -> None:
    """End the process as a kill would, which every file of a run is made to survive."""
    cursor = _SHOW_CURSOR if os.isatty(2) else ""
    write_error(f"{cursor}lightship: {text}\n")
    os._exit(code)


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
