"""The table of findings: Rich in a terminal, aligned lines elsewhere, or JSON lines."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightship.doctor.check import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
_STATUS_WIDTH = max(map(len, _STYLES))

Show = Callable[[str, Finding], None]


@contextmanager
def table(
    names: Sequence[str], log_format: Literal["auto", "text", "json"], stream: TextIO | None = None
) -> Iterator[Show]:
    """A function to be given each check's name and finding, in the order of the table.

    Args:
        names: Of all checks, for the width of their column.
        log_format: A table if `stream` is a terminal, else lines (auto); lines; JSON lines.
        stream: Where it goes; None: standard output.
    """
    stream = stream or sys.stdout
    width = max(map(len, names))
    console = Console(file=stream, highlight=False)
    if log_format == "json":
        yield lambda name, finding: _print_json(name, finding, stream)
    elif log_format == "text" or not console.is_interactive:
        yield lambda name, finding: print(lines(name, finding, width), file=stream, flush=True)
    else:
        with _rich(console, len(names)) as show:
            yield show


def lines(name: str, finding: Finding, name_width: int) -> str:
    """A finding as a line, and as a second one the fix, in columns."""
    words = finding.found + (f": {finding.means}" if finding.means else "")
    text = f"{finding.status:<{_STATUS_WIDTH}}  {name:<{name_width}}  {_one_line(words)}"
    if finding.fix:
        text += f"\n{'':<{_STATUS_WIDTH}}  {'':<{name_width}}  fix: {_one_line(finding.fix)}"
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_json(name: str, finding: Finding, stream: TextIO) -> None:
    fact = {
        "event": "check",
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "check": name,
        "status": finding.status,
        "found": finding.found,
        "means": finding.means,
        "fix": finding.fix,
    }
    print(json.dumps(fact), file=stream, flush=True)


@contextmanager
def _rich(console: Console, count: int) -> Iterator[Show]:
    """The table at once at the end; until then what is waited for."""
    rows = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    rows.add_column("")
    rows.add_column("check", no_wrap=True)
    for title in ("found", "what it means", "fix"):
        rows.add_column(title, ratio=2, overflow="fold")
    with console.status(f"{count} checks, side by side") as status:
        done = []

        def show(name: str, finding: Finding) -> None:
            style = _STYLES[finding.status]
            texts = (finding.found, finding.means, finding.fix)
            rows.add_row(
                Text(finding.status, style=style),
                Text(name, style="bold"),
                *(Text(text, style="dim" if finding.status == "skipped" else "") for text in texts),
            )
            done.append(name)
            status.update(f"{len(done)} of {count} checks done")

        yield show
    console.print(rows)
