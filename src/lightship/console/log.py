"""The one logger: `logging.getLogger("lightship")`, shown as a run's lines while a command runs.

How to log, in any module (torch is not imported):

    logger = logging.getLogger(__name__)           # a child of "lightship"
    logger.info(f"resuming from step {step}")      # a line for the user
    logger.warning(f"{url} is damaged; skipping")  # the same, marked

With `--run.log_format text` the two are `[   0:01] resuming from step 7` and
`[   0:01] warning: ... is damaged; skipping`; with json, events `note` and `warning` with a `text`.
They appear above the progress bar, whichever thread logs. Level: `--run.log_level`. Ranks other
than 0 show warnings only, with their rank. `cli.main` installs the handler for the time of the
command; in a program that uses lightship as a library, standard logging applies. Tests read the
lines by capsys (through `cli.main`) or caplog (without).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lightship.console import streams
from lightship.console.screen import Screen

_LOGGER = logging.getLogger("lightship")
_EVENTS = {logging.INFO: "note"}
"""Level -> JSON event, where that is not the level's name."""


class ScreenHandler(logging.Handler):
    """Shows records on a screen.

    Attributes:
        screen: Where they go.
        rank: Of this process; others than 0 show warnings only.
    """

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen, self.rank = screen, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        if self.rank and record.levelno < logging.WARNING:
            return
        try:
            text = f"rank {self.rank}: " * bool(self.rank) + record.getMessage()
            level, below = record.levelname.lower(), []
            if record.exc_info and record.exc_info[1] is not None:
                below = streams.traceback_lines(record.exc_info[1])
            if self.screen.is_json:
                facts = {"text": text, **({"traceback": below} if below else {})}
                self.screen.event(_EVENTS.get(record.levelno, level), facts)
            else:
                self.screen.line(text if level == "info" else f"{level}: {text}", below=below)
        except Exception:
            self.handleError(record)


@contextmanager
def shown(screen: Screen, level: str) -> Iterator[None]:
    """Show what lightship's loggers log at `level` (debug, info or warning) and above."""
    handler, before = ScreenHandler(screen), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False  # a library that configures the root logger would show lines twice
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(before)
        _LOGGER.propagate = True


@contextmanager
def captured(name: str) -> Iterator[list[str]]:
    """Collect the warnings that a logger and its children log, in place of showing them."""
    logger, handler = logging.getLogger(name), _ListHandler(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


class _ListHandler(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def screen() -> Screen | None:
    """The screen that records are shown on; None outside a command."""
    return next((handler.screen for handler in _handlers()), None)


def set_rank(rank: int) -> None:
    """Tell the handler, if there is one, this process's global rank."""
    for handler in _handlers():
        handler.rank = rank


def _handlers() -> list[ScreenHandler]:
    return [handler for handler in _LOGGER.handlers if isinstance(handler, ScreenHandler)]
