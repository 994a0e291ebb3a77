"""The table of findings: Rich in a terminal, aligned lines elsewhere, or JSON lines."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
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
    if log_format == "json":
        yield lambda name, finding: streams.write_line(stream, _json(name, finding))
    elif log_format == "text" or not console.is_interactive:
        width = max(map(len, names))
        yield lambda name, finding: streams.write_line(stream, _lines(name, finding, width))
    else:
        with _rich(console, len(names)) as show:
            yield show


def _lines(name: str, finding: Finding, name_width: int) -> str:
    finding = Finding(*map(shown, astuple(finding)))  # type: ignore[arg-type]
    words = finding.found + (f": {finding.means}" if finding.means else "")
    text = f"{finding.status:<{_STATUS_WIDTH}}  {name:<{name_width}}  {' '.join(words.split())}"
    if finding.fix:
        text += f"\n{'':<{_STATUS_WIDTH}}  {'':<{name_width}}  fix: {' '.join(finding.fix.split())}"
    return text


def _json(name: str, finding: Finding) -> str:
    return streams.event("check", {"check": name, **asdict(finding)})


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
            style = _STYLES[finding.status]
            texts = map(shown, (finding.found, finding.means, finding.fix))
            rows.add_row(
                Text(finding.status, style=style),
                Text(name, style="bold"),
                *(Text(text, style="dim" if finding.status == "skipped" else "") for text in texts),
            )
            status.update(f"{rows.row_count} of {count} checks done")

        yield show
    console.print(rows)
