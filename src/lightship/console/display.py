"""How progress looks: a live bar in a terminal, timed lines or JSON lines elsewhere."""

import logging
import math
from time import monotonic
from typing import Any, TextIO

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lightship.console import log
from lightship.console.log_format import best, duration_text, numbers, part_of, sentence
from lightship.console.screen import Screen

logger = logging.getLogger(__name__)
_LINE_EVERY_S = 5.0
_FRAME_EVERY_S = 0.2


def build_display(log_format: str, stream: TextIO | None = None) -> "Display":
    """The display of a command's progress.

    Args:
        log_format: auto (a bar if `stream` is a terminal, else lines), text or json.
        stream: Where it goes; None: where the command's log lines go.
    """
    screen = (None if stream else log.screen()) or Screen(log_format, stream)
    if screen.is_json:
        return JsonLines(screen)
    return TextLines(screen) if screen.console is None else Bar(screen)


class Display:
    """Shows events and knows when the next is due.

    A line is due 5 s after the one before, later after 1/60 of the time spent, at most 60 s.

    Attributes:
        repeats_numbers: Whether numbers are shown again until there are newer ones.
    """

    repeats_numbers = False

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._due_s = -math.inf

    @property
    def began_s(self) -> float:
        """When the command began, by `monotonic`."""
        return self._screen.began_s

    def is_due(self) -> bool:
        """Whether an event is due; if so, the next is due an interval later."""
        is_due = monotonic() >= self._due_s
        if is_due:
            self.postpone()
        return is_due

    def postpone(self) -> None:
        """The next event is due an interval from now."""
        now = monotonic()
        self._due_s = now + self._interval_s(now - self.began_s)

    def begin(self) -> None:
        """Take the screen, if the display needs it."""

    def end(self) -> None:
        """Give the screen back."""

    def show(self, event: str, facts: dict[str, Any]) -> None:
        """Show an event (train, val, batch, pace, end, test, validate or work).

        Args:
            event: What `facts` are of.
            facts: Finite numbers, texts and None where not known.
        """
        self._show(event, {"time_s": round(monotonic() - self.began_s, 3), **facts})

    def done(self, text: str, numbers: dict[str, float]) -> None:
        """Show how a run has ended: `text`, or `numbers` where lines are for programs."""
        logger.info(text)

    def _interval_s(self, spent_s: float) -> float:
        return min(60.0, max(_LINE_EVERY_S, spent_s / 60))

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        raise NotImplementedError


class JsonLines(Display):
    """One JSON object per line: event, time and facts."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        self._screen.event(event, facts)

    def done(self, text: str, numbers: dict[str, float]) -> None:
        """One object with all numbers."""
        self._screen.event("done", {name: finite(value) for name, value in numbers.items()})


class TextLines(Display):
    """One aligned line per event."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        self._screen.line(sentence(event, facts), time_s=facts["time_s"])


_STYLE_OF_LINES = {
    "pace": "", "val": "", "validate": "bold", "test": "bold", "end": "bold green",
}  # fmt: skip


class Bar(Display):
    """A live bar with the newest numbers below it; validations stay above it as lines.

    Drawn by the calling thread, at most 5 times a second.
    """

    repeats_numbers = True

    def __init__(self, screen: Screen) -> None:
        super().__init__(screen)
        self._live: Live | None = None

    def begin(self) -> None:
        """Start to draw."""
        self._live = Live(console=self._screen.console, auto_refresh=False, transient=True)
        self._live.start()

    def end(self) -> None:
        """Erase the bar and show the cursor."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _interval_s(self, spent_s: float) -> float:
        return _FRAME_EVERY_S

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        style = _STYLE_OF_LINES.get(event)
        if style is not None:
            # Without what the bar shows below it.
            line = sentence(event, {**facts, "train/loss": None, "left_s": None})
            self._screen.line(line, style, facts["time_s"])
        if self._live is not None and "left_s" in facts:
            self._live.update(_frame(facts), refresh=True)


def _frame(facts: dict[str, Any]) -> Group:
    """The bar and the row of numbers below it."""
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    bar.add_column(no_wrap=True, justify="right")
    left = "" if facts["left_s"] is None else f"{duration_text(facts['left_s'])} left"
    if "epoch" not in facts:
        begin, done, total, unit = _work(facts)
        of = Text(f"{done:,}/{total:,} {unit}" if total else f"{done:,} {unit}", style="dim")
        shown = ProgressBar(total=total, completed=done, complete_style="cyan")
        bar.add_row(Text(begin), shown, of, Text(left, style="cyan"))
        return Group(bar)
    total = facts["max_steps"]
    bar.add_row(
        Text(part_of("epoch", facts["epoch"], facts["max_epochs"]), style="bold"),
        ProgressBar(total=total, completed=facts["step"], complete_style="cyan"),
        Text(part_of("", facts["step"], total), style="dim"),
        Text(left, style="cyan"),
    )
    row = Text("  ", no_wrap=True, overflow="ellipsis")
    for name, value in numbers(facts, "loss", "acc", "speed", "wait") + best(facts):
        row.append(f"{name} ", style="dim").append(value.strip()).append("   ")
    if "doing" in facts:
        row.append(f"{facts['doing']} {facts['batch']}/{facts['batches'] or '?'}", style="yellow")
    return Group(bar, row)


def _work(facts: dict[str, Any]) -> tuple[str, int, int | None, str]:
    """What is done outside of a fit: how it begins, done, total and their unit."""
    if "doing" in facts:
        return facts["doing"], facts["batch"], facts["batches"], "batches"
    return f"{facts['per_s']:,.0f}/s", facts["done"], facts["total"], facts["unit"]


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
