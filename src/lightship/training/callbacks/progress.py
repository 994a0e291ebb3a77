"""What a person sees while a run goes on: a bar in a terminal, timed lines or JSON elsewhere."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
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
_VALIDATION_LINE_EVERY_S = 2.0
_PACE_KNOWN_AFTER_S = 5.0
_FRAME_EVERY_S = 0.2


def build_progress(
    log_format: str,
    monitor: str = "val/loss",
    stream: TextIO | None = None,
) -> "Progress":
    """The progress display of a run; give the Trainer `enable_progress_bar=False` beside it.

    Args:
        log_format: a bar if `stream` is a terminal, else lines (auto); lines; JSON lines.
        monitor: the metric that tells which validation was the best.
        stream: where it goes; None: where the command's log lines go.
    """
    screen = (None if stream else log.screen()) or Screen(log_format, stream)
    if screen.is_json:
        return JsonLines(screen, monitor)
    return TextLines(screen, monitor) if screen.console is None else Bar(screen, monitor)


class Progress(Callback):
    """Follows the trainer and says when there is something to show. Rank 0 only.

    It shows numbers that are on the host already (those of the last log point, and what the
    loggers were given at a validation), so it never waits for the device. A line comes at most
    every 5 s (later once in 1/60 of the time spent, up to 60 s), at validations at most every
    2 s, and always at the end. Once it is known, one line tells how long an epoch takes.

    Attributes:
        repeats_numbers: Whether training's numbers are shown again while there are no newer ones.
    """

    repeats_numbers = False

    def __init__(self, screen: Screen, monitor: str) -> None:
        self._screen, self._monitor = screen, monitor
        self._created_s = screen.began_s
        self._due_s = self._validation_shown_s = -math.inf
        self._held_back = False
        self._shown_done = -1
        self._best: tuple[float, int] | None = None
        self._shown_numbers: float | None = None
        self._first_step = 0
        self._train_began_s = self._first_batch_done_s = screen.began_s
        self._batches = 0  # until the pace is told
        self._pace_is_told = False
        self._total_steps = math.inf

    def done(self, text: str, numbers: dict[str, float]) -> None:
        """Show how a run has ended: as `text`, or its numbers where lines are for programs."""
        logger.info(text)

    @contextmanager
    def of_work(self, unit: str) -> Iterator[Callable[[int, int], None]]:
        """For work without a trainer: a function to be called often with (done, total) of `unit`.

        It shows what is due, and the end; the speed is that since the first call.
        """
        first: list[tuple[float, int]] = []

        def show(done: int, total: int) -> None:
            now = monotonic()
            if not first:
                first.append((now, done))
                self._set_due(now)
                self._begin()
            if self._is_time() or done == total > self._shown_done:
                spent_s, new = now - first[0][0], done - first[0][1]
                speed = new / spent_s if spent_s > 0 else 0.0
                left_s = (total - done) / speed if speed else math.inf
                facts = {"unit": unit, "done": done, "total": total, "per_s": round(speed, 3)}
                times = {"time_s": round(now - self._created_s, 3), "left_s": _finite(left_s)}
                self._shown_done = done
                self._set_due(now)
                self._show("work", {**facts, **times})

        try:
            yield show
        finally:
            self._end()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where this process began, for the time left, and the run's best so far."""
        self._first_step, self._train_began_s = trainer.global_step, monotonic()
        self._total_steps = float(trainer.estimated_stepping_batches)
        for logger in trainer.loggers:
            for row in getattr(logger, "rows", ()):
                if self._monitor in row:
                    self._note_best(row, int(row["epoch"]) + 1)
        if trainer.is_global_zero:
            self._begin()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show training, if it is time."""
        if not trainer.is_global_zero:
            return
        if not self._pace_is_told:
            self._tell_pace(trainer)
        if self._is_time():
            self._show("train", self._newer(self._facts(trainer)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation's result, unless the last was just shown."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show("validate", self._results(trainer))
            return
        values = _host_values(trainer)
        if self._monitor in values:
            self._note_best(values, trainer.current_epoch + 1)
        now = monotonic()
        self._held_back = now - self._validation_shown_s < _VALIDATION_LINE_EVERY_S
        if not self._held_back:
            self._validation_shown_s = now
            self._set_due(now)
            self._show("val", self._facts(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the test's result."""
        if trainer.is_global_zero:
            self._show("test", self._results(trainer))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show how far a long validation is."""
        self._show_batch(trainer, "validating", args[3], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show how far a long test is."""
        self._show_batch(trainer, "testing", args[3], trainer.num_test_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last numbers, and leave the screen to others."""
        if trainer.is_global_zero:
            if self._held_back:
                self._show("val", self._facts(trainer))
            self._show("end", self._facts(trainer))
            self._end()

    def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave the screen to the error."""
        if trainer.is_global_zero:
            self._end()

    def _tell_pace(self, trainer: Trainer) -> None:
        """Tell how long an epoch takes, by the batches after the first, which may have compiled."""
        now = monotonic()
        self._batches += 1
        if self._batches == 1:
            self._first_batch_done_s = now
            return
        spent_s = now - self._first_batch_done_s
        if spent_s >= _PACE_KNOWN_AFTER_S or trainer.is_last_batch:
            self._pace_is_told = True
            batches = int(trainer.num_training_batches)
            steps = batches // trainer.accumulate_grad_batches
            epoch_s = spent_s / (self._batches - 1) * batches
            facts = {"epoch_steps": steps, "epoch_s": round(epoch_s, 3)}
            self._show("pace", {"time_s": round(now - self._created_s, 3), **facts})

    def _interval_s(self, now: float) -> float:
        return min(60.0, max(_LINE_EVERY_S, (now - self._created_s) / 60))

    def _set_due(self, now: float) -> None:
        self._due_s = now + self._interval_s(now)

    def _is_time(self) -> bool:
        now = monotonic()
        if now < self._due_s:
            return False
        self._set_due(now)
        return True

    def _show_batch(self, trainer: Trainer, doing: str, batch_idx: int, sizes: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and self._is_time():
            [total] = sizes if isinstance(sizes, list) else [sizes]  # there is one loader
            facts = {"doing": doing, "batch": batch_idx + 1, "batches": _count(total)}
            self._show("batch", {**self._facts(trainer), **facts})

    def _note_best(self, values: Mapping[str, float], epoch: int) -> None:
        value = values[self._monitor]
        if not math.isfinite(value) or not math.isfinite(values.get("val/loss", 0.0)):
            return  # as no checkpoint is scored then (see Checkpointing)
        is_lowest = self._monitor.endswith("loss")
        best = self._best[0] if self._best else math.inf if is_lowest else -math.inf
        if value < best if is_lowest else value > best:
            self._best = value, epoch

    def _newer(self, facts: dict[str, Any]) -> dict[str, Any]:
        """`facts`, without training's numbers where the line before had the same ones."""
        newest = facts.get("throughput/step_ms")
        if newest == self._shown_numbers and not self.repeats_numbers:
            old = ("train/", "throughput/", "lr")
            facts = {key: value for key, value in facts.items() if not key.startswith(old)}
        self._shown_numbers = newest
        return facts

    def _results(self, trainer: Trainer) -> dict[str, Any]:
        """What an evaluation outside a fit has found."""
        values = {key: _finite(value) for key, value in _host_values(trainer).items()}
        return {"time_s": round(monotonic() - self._created_s, 3), **values}

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        """Everything a display may show, as plain values; None where not known."""
        step, now = trainer.global_step, monotonic()
        done, steps_left = step - self._first_step, self._total_steps - step
        left_s = (now - self._train_began_s) / done * steps_left if done > 0 else math.inf
        return {
            "time_s": round(now - self._created_s, 3),
            "epoch": trainer.fit_loop.epoch_progress.current.ready,
            "max_epochs": trainer.max_epochs if trainer.max_epochs != -1 else None,
            "step": step,
            "max_steps": _count(self._total_steps),
            "left_s": _finite(left_s),
            "monitor": self._monitor,
            "best": self._best and self._best[0],
            "best_epoch": self._best and self._best[1],
            **{key: _finite(value) for key, value in _host_values(trainer).items()},
        }

    def _begin(self) -> None: ...

    def _end(self) -> None: ...

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        raise NotImplementedError


class JsonLines(Progress):
    """One JSON object a line: event (train, val, batch, pace, ..., note, done), time, facts."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        self._screen.event(event, facts)

    @rank_zero_only
    def done(self, text: str, numbers: dict[str, float]) -> None:
        """One object of all numbers."""
        self._show("done", {name: _finite(value) for name, value in numbers.items()})


class TextLines(Progress):
    """One aligned line at a time."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        self._screen.line(sentence(event, facts), time_s=facts["time_s"])


_STYLE_OF_LINES = {
    "pace": "", "val": "", "validate": "bold", "test": "bold", "end": "bold green",
}  # fmt: skip


class Bar(Progress):
    """A live bar with the newest numbers under it; validations stay above it as lines.

    Drawn by the training thread, at most 5 times a second: no thread of its own.
    """

    repeats_numbers = True

    def __init__(self, screen: Screen, monitor: str) -> None:
        super().__init__(screen, monitor)
        self._live: Live | None = None

    def _interval_s(self, now: float) -> float:
        return _FRAME_EVERY_S

    def _begin(self) -> None:
        self._live = Live(console=self._screen.console, auto_refresh=False, transient=True)
        self._live.start()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        style = _STYLE_OF_LINES.get(event)
        if style is not None:
            # Without what the bar shows below it.
            said = sentence(event, {**facts, "train/loss": None, "left_s": None})
            self._screen.line(said, style, facts["time_s"])
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
    if "unit" in facts:
        done, total = facts["done"], facts["total"]
        of = Text(f"{done:,}/{total:,} {facts['unit']}", style="dim")
        shown = ProgressBar(total=total, completed=done, complete_style="cyan")
        bar.add_row(Text(f"{facts['per_s']:,.0f}/s"), shown, of, Text(left, style="cyan"))
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


def _finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def _count(value: float) -> int | None:
    """`value` as a whole number, or None for an unbounded one."""
    return int(value) if math.isfinite(value) else None


def _host_values(trainer: Trainer) -> dict[str, float]:
    """Newest metrics that need no fetch: on the CPU, or kept as floats by a logger (`latest`)."""
    metrics = trainer.callback_metrics.items()
    values = {key: float(value) for key, value in metrics if value.device.type == "cpu"}
    for logger in trainer.loggers:
        values.update(getattr(logger, "latest", {}))
    return {key: value for key, value in values.items() if "/" in key or key == "lr"}
