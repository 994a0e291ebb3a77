"""Standard streams that never end a run, set up once at the start of a process. Imports no torch.

A log is worth nothing to a run compared with its training: a line that cannot be written (a closed
pipe, a full disk, a terminal that went away) is dropped, and one that the encoding has no letters
for is written with escapes. Whoever writes to them, a library or an uncaught exception: secrets are
left out, and where lines are JSON, what is none becomes an event `output`.
"""

import atexit
import contextlib
import errno
import io
import json
import os
import select
import sys
import threading
import traceback
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lightship.errors import ConfigError
from lightship.redaction import redact
from lightship.safe_text import printable, shown

_WRITABLE_WITHIN_S = 1.0
"""How long a stream that others have made non-blocking may take to become writable."""


class _Lossy(io.FileIO):
    """A descriptor whose writes never raise.

    Attributes:
        lost: The first error of a write since the start; None: all is written.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write what can be written; the rest counts as written too."""
        try:
            written = super().write(data)
            if written is None:  # a non-blocking descriptor that is full
                select.select([], [self], [], _WRITABLE_WITHIN_S)
                written = super().write(data)
        except (OSError, ValueError) as error:  # select takes no descriptor above 1023
            self.lost = self.lost or (error if isinstance(error, OSError) else None)
            return len(memoryview(data).cast("B"))
        return len(memoryview(data).cast("B")) if written is None else written


def set_up() -> None:
    """Open missing descriptors, and let no write to stdout or stderr fail. First in a process."""
    open_missing()
    sys.stdout = _lossy(sys.stdout, 1)
    sys.stderr = _lossy(sys.stderr, 2)


def open_missing() -> None:
    """Open those of descriptors 0 to 2 that are closed on /dev/null, for child processes too.

    Else the next file or socket that is opened gets the number, and whoever writes to standard
    error writes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(number, True)


def write_error(text: str) -> None:
    """Write to standard error without Python's buffers, as a signal handler must; never raises."""
    with contextlib.suppress(OSError):  # nobody can read it
        os.write(2, text.encode(errors="backslashreplace"))


def check_output() -> None:
    """See that standard output has taken all, where it is what a command is run for.

    A reader that has seen enough (`| head`) is no error.

    Raises:
        ConfigError: It has not.
    """
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Lossy):
        sys.stdout.flush()
        if raw.lost is not None and raw.lost.errno != errno.EPIPE:
            raise ConfigError(f"standard output cannot be written: {raw.lost.strerror}")


def event(name: str, facts: dict[str, Any]) -> str:
    """A JSON object: event, time (ISO 8601, UTC) and the facts, whose texts become printable."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    plain = {key: _shown_value(value) for key, value in facts.items()}
    return json.dumps({"event": name, "time": now, **plain}, allow_nan=False)


def _shown_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown_value(each) for each in value]
    return shown(value) if isinstance(value, str) else value


def write_line(stream: TextIO, line: str) -> None:
    """Write a line, and flush: one that `event` or `safe_text.shown` made, which stays as it is."""
    write = stream.write_whole if isinstance(stream, _Guarded) else stream.write
    write(f"{line}\n")
    stream.flush()


def write_result(text: str) -> None:
    """Write what a command is run for to standard output, as it is also where lines are JSON."""
    write_line(sys.stdout, redact(text).removesuffix("\n"))


def show_foreign_text(as_json: bool) -> None:
    """Show warnings, uncaught exceptions and prints as the command's own lines.

    Args:
        as_json: Whether each of them is an event (warning, error, output).
    """
    warnings.showwarning = partial(_show_warning, as_json)
    sys.excepthook = partial(_show_exception, as_json)
    threading.excepthook = partial(_show_exception_of_thread, as_json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Guarded):
            stream.as_json = as_json


def is_json() -> bool:
    """Whether `show_foreign_text` has made lines JSON."""
    return isinstance(sys.stderr, _Guarded) and sys.stderr.as_json


def _show_warning(
    as_json: bool,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for a warning of lightship; with its place and source for one of a library."""
    text = " ".join(str(message).split())
    if as_json:
        write_line(sys.stderr, event("warning", {"text": text}))
    elif filename.startswith(str(Path(__file__).parents[1])):
        write_line(sys.stderr, f"lightship: {shown(text)}")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        for each in text.rstrip("\n").split("\n"):
            write_line(file or sys.stderr, shown(each))


def _show_exception(
    as_json: bool,
    kind: type[BaseException],
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    assert error is not None
    lines = traceback_lines(error.with_traceback(trace))
    if as_json:
        facts = {"text": f"{kind.__name__}: {error}", "traceback": lines}
        write_line(sys.stderr, event("error", facts))
    else:
        write_line(sys.stderr, "\n".join(lines))


def _show_exception_of_thread(as_json: bool, args: threading.ExceptHookArgs) -> None:
    if not issubclass(args.exc_type, SystemExit):  # as Python's own
        _show_exception(as_json, args.exc_type, args.exc_value, args.exc_traceback)


def traceback_lines(error: BaseException) -> list[str]:
    """A traceback without secrets and controls; only Python's own lines are not indented."""
    found: list[str] = []
    for piece in traceback.format_exception(error):
        first, *rest = redact(piece).strip("\n").split("\n")
        found += [first, *(line if line.startswith("  ") else f"    {line}" for line in rest)]
    return [printable(line) for line in found]


class _Guarded(io.TextIOWrapper):
    """A standard stream, for whoever writes to it: prints, libraries, the interpreter.

    Attributes:
        as_json: Whether each line that is written becomes an event `output`.
    """

    as_json = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rest, self._turn = "", threading.RLock()
        atexit.register(self._end_line)

    def write(self, text: str) -> int:
        """Write without secrets; as events, line by line, where lines are JSON."""
        if not self.as_json:
            super().write(redact(text))
            return len(text)
        with self._turn:
            *lines, self._rest = f"{self._rest}{text}".split("\n")
            for line in lines:
                self._write_output(line)
        return len(text)

    def write_whole(self, text: str) -> None:
        """Write what is already without secrets, and JSON if lines are."""
        super().write(text)

    def _write_output(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2]  # of a bar that is drawn anew, the last state
        if line.strip():
            self.write_whole(event("output", {"text": line}) + "\n")

    def _end_line(self) -> None:
        with self._turn, contextlib.suppress(ValueError):  # closed
            self._write_output(self._rest)
            self._rest = ""


def _lossy(stream: TextIO | None, number: int) -> TextIO:
    """`stream`'s guarded successor on the same descriptor, with its encoding and buffering."""
    if stream is not None:
        stream.flush()
    return _Guarded(
        io.BufferedWriter(_Lossy(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == 2 or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )
