"""What SIGTERM, SIGINT and SIGHUP do in each phase of a process: one table, `RESPONSES`.

A SIGTERM of a liveness probe ends with the code of a timeout (74), unless a checkpoint is saved.
Worker processes handle signals in the phases of their command; their agent is in phases of its own.
"""

import dataclasses
import os
import signal
import threading
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any

from lightship.console.streams import event, is_json, write_error
from lightship.distributed import liveness
from lightship.errors import EXIT_CODES, LightshipError, Preempted, TimeoutExpired

_SHOW_CURSOR = "\x1b[?25h"
_TIMEOUT = EXIT_CODES["timeout"].code


class Phase(Enum):
    """What a process is doing, as far as a signal is concerned."""

    COMMAND = "imports and parsing; then test, validate, export and doctor"
    LAUNCH = "the agent, until its workers run: imports, and the rendezvous with other nodes"
    AGENT = "the agent, once its workers run"
    SETUP = "fit before training"
    TRAINING = "fit in training and validation"
    REPORT = "fit after training: test and report"
    PREDICT = "predict"
    PACK = "pack"


class Action(Enum):
    """What a signal leads to. A handler runs between any two bytecodes, so it does no more."""

    EXIT = "exit at once: everything that matters is durable"
    RAISE = "raise Preempted in the main thread, so that temporary files are removed"
    DEFER = "set a flag: finish the step or validation batch, save a checkpoint, raise Preempted"
    FORWARD = "torch elastic signals the workers and waits for them; then raise Preempted"


@dataclass(frozen=True)
class Response:
    """A row of the table.

    Attributes:
        action: What the handler does.
        message: The line for the user; fields: `signal`, and `step` where a checkpoint is saved.
        exit_code: Of the process.
    """

    action: Action
    message: str
    exit_code: int = EXIT_CODES["preempted"].code

    def text(self, number: int, step: int | None = None) -> str:
        """The line for the user after signal `number`; 0 stands for a signal to another rank."""
        name = signal.Signals(number).name if number else "a peer"
        return self.message.format(signal=name, step=step)


_RESUMABLE = "stopped by {signal}; rerun the command to resume"
RESPONSES = {
    Phase.COMMAND: Response(Action.EXIT, "stopped by {signal}"),
    Phase.LAUNCH: Response(Action.RAISE, "stopped by {signal} before the workers started"),
    Phase.AGENT: Response(Action.FORWARD, "stopped by {signal}"),
    Phase.SETUP: Response(Action.EXIT, _RESUMABLE),
    Phase.TRAINING: Response(
        Action.DEFER, "stopped by {signal}: checkpoint saved at step {step}; rerun to resume"
    ),
    Phase.REPORT: Response(Action.EXIT, _RESUMABLE),
    Phase.PREDICT: Response(Action.EXIT, _RESUMABLE),
    Phase.PACK: Response(Action.RAISE, _RESUMABLE),
}
SECOND_SIGINT = Response(Action.EXIT, "stopped without saving: {signal} after a stop request", 130)
"""For SIGINT once the flag is set, in whatever phase."""


def stop_signals() -> tuple[int, ...]:
    """The signals that ask a process to save and end.

    SIGHUP (the terminal went away) is one of them unless it is ignored, as under `nohup`.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    return tuple(signals)


def _response(number: int, phase: Phase) -> Response:
    """The row of a phase; of a probe's SIGTERM, with its reason and the code of a timeout."""
    reason = liveness.why_expired() if number == signal.SIGTERM else ""
    row = RESPONSES[phase]
    return dataclasses.replace(row, message=reason, exit_code=_TIMEOUT) if reason else row


def stopped(number: int, phase: Phase, text: str = "") -> LightshipError:
    """What a signal ends a process with that is not ended by its handler.

    Args:
        number: The signal.
        phase: In which it came.
        text: In place of the row's.
    """
    response = _response(number, phase)
    if response.exit_code == _TIMEOUT:
        return TimeoutExpired(response.text(number))
    return Preempted(text or response.text(number))


def _last_line(response: Response, number: int) -> str:
    """What a process that exits within its signal handler writes."""
    if is_json():
        return (
            event("error", {"exit_code": response.exit_code, "text": response.text(number)}) + "\n"
        )
    cursor = _SHOW_CURSOR if os.isatty(2) else ""
    return f"{cursor}lightship: {response.text(number)}\n"


class StopRequest:
    """Handles the stop signals by the table, and is true once one of them has set the flag.

    Handlers can be installed in the main thread only; elsewhere nothing is handled. As a context
    manager it restores the handlers that it has replaced.

    Attributes:
        phase: Which row of `RESPONSES` applies.
        number: The signal that has set the flag; 0: none.
    """

    def __init__(self, phase: Phase = Phase.SETUP) -> None:
        self.phase, self.number = phase, 0
        self._replaced: dict[int, Any] = {}

    def install(self) -> None:
        """Replace the handlers of `stop_signals`."""
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._replaced[number] = signal.signal(number, self._handle)

    def __enter__(self) -> "StopRequest":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.number)

    def begin_training(self) -> None:
        """From here on only set the flag."""
        self.phase = Phase.TRAINING

    def end_training(self) -> None:
        """From here on exit at once.

        Raises:
            Preempted: The flag is set already.
        """
        self.phase = Phase.REPORT
        if self:
            raise Preempted(RESPONSES[self.phase].text(self.number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        response = _response(number, self.phase)
        if number == signal.SIGINT and self:
            response = SECOND_SIGINT
        if response.action is Action.EXIT:
            write_error(_last_line(response, number))
            os._exit(response.exit_code)
        if response.action is Action.RAISE:
            raise stopped(number, self.phase)
        self.number = self.number or number
