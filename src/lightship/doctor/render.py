"""The table of findings: Rich in a terminal, aligned lines elsewhere, or JSON lines."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightship.console import streams
from lightship.doctor.checks import Finding
from lightship.safe_text import shown

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
_STATUS_WIDTH = max(map(len, _STYLES))

Show = Callable[[str, Finding], None]


@contextmanager
def table(
    names: Sequence[str], log_format: Literal["auto", "text", "json"], stream: TextIO | None = None
) -> Iterator[Show]:
    """A function to call with each check's name and finding, in the order of the table.

    Args:
        names: Of all checks, for the width of their column.
        log_format: A table in a terminal and lines elsewhere (auto), lines, or JSON lines.
        stream: Where it goes; None: standard output.
    """
    stream = stream or sys.stdout
    console = Console(file=stream, highlight=False)
    if log_format == "auto" and console.is_interactive:
        with _rich(console, len(names)) as show:
            yield show
    elif log_format == "json":
        yield lambda name, finding: streams.write_line(
            stream, streams.event("check", {"check": name, **asdict(finding)})
        )
    else:
        width = max(map(len, names))
        yield lambda name, finding: streams.write_line(stream, _lines(name, finding, width))


def _lines(name: str, finding: Finding, name_width: int) -> str:
    means = f": {finding.means}" if finding.means else ""
    lines = [(finding.status, name, finding.found + means), ("", "", f"fix: {finding.fix}")]
    return "\n".join(
        f"{status:<{_STATUS_WIDTH}}  {name:<{name_width}}  {' '.join(shown(text).split())}"
        for status, name, text in lines[: 2 if finding.fix else 1]
    )


@contextmanager
def _rich(console: Console, count: int) -> Iterator[Show]:
    """The whole table at the end; until then a progress line."""
    rows = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    rows.add_column("")
    rows.add_column("check", no_wrap=True)
    for title in ("found", "what it means", "fix"):
        rows.add_column(title, ratio=2, overflow="fold")
    with console.status(f"running {count} checks") as status:

        def show(name: str, finding: Finding) -> None:
            style = "dim" if finding.status == "skipped" else ""
            texts = (finding.found, finding.means, finding.fix)
            rows.add_row(
                Text(finding.status, style=_STYLES[finding.status]),
                Text(name, style="bold"),
                *(Text(shown(text), style=style) for text in texts),
            )
            status.update(f"{rows.row_count} of {count} checks done")

        yield show
    console.print(rows)
