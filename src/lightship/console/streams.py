"""Standard streams that never end a run, set up once at the start of a process. Imports no torch.

A log is worth nothing to a run compared with its training: a line that cannot be written (a closed
pipe, a full disk, a terminal that went away) is dropped, and one that the encoding has no letters
for is written with escapes.
"""

import contextlib
import errno
import io
import json
import os
import select
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from lightship.errors import ConfigError

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


def show_warnings(as_json: bool) -> None:
    """Show lightship's own warnings as one line each, or all warnings as JSON, without source."""
    own, theirs = str(Path(__file__).parents[1]), warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any
    ) -> None:
        text = " ".join(str(message).split())
        if as_json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            print(json.dumps({"event": "warning", "time": now, "text": text}), file=sys.stderr)
        elif filename.startswith(own):
            print(f"lightship: {text}", file=sys.stderr)
        else:
            theirs(message, category, filename, *place, **more)

    warnings.showwarning = show


def _lossy(stream: TextIO | None, number: int) -> TextIO:
    """`stream`'s successor on the same descriptor, with its encoding and buffering."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == 2 or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )
