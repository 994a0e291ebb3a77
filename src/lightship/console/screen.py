"""Where a command's lines go: above the bar of a terminal, plain timed lines, or JSON lines."""

import sys
from collections.abc import Sequence
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any, TextIO

from lightship.console import streams
from lightship.console.log_format import clock
from lightship.safe_text import shown

if TYPE_CHECKING:
    from rich.console import Console


class Screen:
    """Writes lines that begin with the time since it was made. Thread safe.

    Args:
        log_format: auto (a terminal if the stream is one, else text), text or json.
        stream: Where lines go; None: standard error at the time of each line.

    Attributes:
        is_json: Whether lines are JSON objects.
        began_s: When it was made, by `monotonic`.
    """

    def __init__(self, log_format: str, stream: TextIO | None = None) -> None:
        self._log_format, self._stream = log_format, stream
        self.is_json = log_format == "json"
        self.began_s = monotonic()

    @cached_property
    def console(self) -> "Console | None":
        """The terminal, which a bar must share; None: lines are plain."""
        if self._log_format != "auto":
            return None
        from rich.console import Console  # 0.1 s, and many processes never write a line

        console = Console(file=self._stream, stderr=True, highlight=False)
        return console if console.is_interactive else None

    def line(
        self,
        text: str,
        style: str = "none",
        time_s: float | None = None,
        below: Sequence[str] = (),
    ) -> None:
        """Write one line of text, without secrets and control characters.

        Args:
            text: The line.
            style: rich's, for terminals.
            time_s: Since `began_s`; None: now.
            below: Lines below it, already shown as they are written (`streams.traceback_lines`).
        """
        text = shown(text)
        at = clock(monotonic() - self.began_s if time_s is None else time_s)
        if self.console is None:
            self._write("\n".join([at + text, *below]))
        else:
            from rich.text import Text

            line = Text(at, style="dim").append(text, style=style)
            self.console.print(line, *below, sep="\n", markup=False, soft_wrap=True)

    def event(self, name: str, facts: dict[str, Any]) -> None:
        """Write one JSON object: event, time (ISO 8601, UTC) and the facts."""
        self._write(streams.event(name, facts))

    def _write(self, line: str) -> None:
        streams.write_line(self._stream or sys.stderr, line)
