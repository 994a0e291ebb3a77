"""What a person sees while a run goes on: a bar in a terminal, timed lines or JSON elsewhere."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_LINE_EVERY_S = 5.0
_VALIDATION_LINE_EVERY_S = 2.0
_PACE_KNOWN_AFTER_S = 5.0
_FRAME_EVERY_S = 0.2


def build_progress(
    log_format: Literal["auto", "text", "json"], stream: TextIO | None = None
) -> "Progress":
    """The progress display of a run; give the Trainer `enable_progress_bar=False` beside it.

    Args:
        log_format: a bar if `stream` is a terminal, else lines (auto); lines; JSON lines.
        stream: where it goes; None: standard error.
    """
    stream = stream or sys.stderr
    if log_format == "json":
        return JsonLines(stream)
    if log_format == "auto" and Console(file=stream).is_interactive:
        return Bar(stream)
    return TextLines(stream)


def duration_text(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on; `-` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress(Callback):
    """Follows the trainer and says when there is something to show. Rank 0 only.

    It shows numbers that are on the host already (those of the last log point, and what the
    loggers were given at a validation), so it never waits for the device. A line comes at most
    every 5 s (later once in 1/60 of the time spent, up to 60 s), at validations at most every
    2 s, and always at the end. Once it is known, one line tells how long an epoch takes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._created_s = monotonic()
        self._shown_s = self._validation_shown_s = -math.inf
        self._held_back = False
        self._shown_done = -1
        self._best_acc = -math.inf
        self._first_step = 0
        self._train_began_s = self._first_batch_done_s = self._created_s
        self._batches = 0  # until the pace is told
        self._pace_is_told = False
        self._total_steps = math.inf

    @rank_zero_only
    def note(self, text: str) -> None:
        """Print one line of `text`, whole, whatever is on the screen."""
        self._show_note(text)

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
                self._shown_s = now
                self._begin()
            if self._is_time() or done == total > self._shown_done:
                spent_s, new = now - first[0][0], done - first[0][1]
                speed = new / spent_s if spent_s > 0 else 0.0
                left_s = (total - done) / speed if speed else math.inf
                facts = {"unit": unit, "done": done, "total": total, "per_s": round(speed, 3)}
                times = {"time_s": round(now - self._created_s, 3), "left_s": _finite(left_s)}
                self._shown_done, self._shown_s = done, now
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
                self._best_acc = max(self._best_acc, row.get("val/acc", -math.inf))
        if trainer.is_global_zero:
            self._begin()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show training, if it is time."""
        if not trainer.is_global_zero:
            return
        if not self._pace_is_told:
            self._tell_pace(trainer)
        if self._is_time():
            self._show("train", self._facts(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation's result, unless the last was just shown."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show("validate", self._facts(trainer))
            return
        self._best_acc = max(self._best_acc, _host_values(trainer).get("val/acc", -math.inf))
        now = monotonic()
        self._held_back = now - self._validation_shown_s < _VALIDATION_LINE_EVERY_S
        if not self._held_back:
            self._validation_shown_s = self._shown_s = now
            self._show("val", self._facts(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the test's result."""
        if trainer.is_global_zero:
            self._show("test", self._facts(trainer))

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

    def _interval_s(self) -> float:
        return min(60.0, max(_LINE_EVERY_S, (monotonic() - self._created_s) / 60))

    def _is_time(self) -> bool:
        now = monotonic()
        due = now - self._shown_s >= self._interval_s()
        if due:
            self._shown_s = now
        return due

    def _show_batch(self, trainer: Trainer, doing: str, batch_idx: int, sizes: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and self._is_time():
            [total] = sizes if isinstance(sizes, list) else [sizes]  # there is one loader
            facts = {"doing": doing, "batch": batch_idx + 1, "batches": _count(total)}
            self._show("batch", {**self._facts(trainer), **facts})

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
            "val/best_acc": _finite(self._best_acc),
            **{key: _finite(value) for key, value in _host_values(trainer).items()},
        }

    def _begin(self) -> None: ...

    def _end(self) -> None: ...

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        raise NotImplementedError

    def _show_note(self, text: str) -> None:
        raise NotImplementedError


class JsonLines(Progress):
    """One JSON object a line: event (train, val, batch, pace, ..., work, note), time, facts."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": now, **facts}, allow_nan=False)
        print(line, file=self._stream, flush=True)

    def _show_note(self, text: str) -> None:
        self._show("note", {"text": text})


class TextLines(Progress):
    """One aligned line at a time."""

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        print(_clock(facts["time_s"]) + _sentence(event, facts), file=self._stream, flush=True)

    def _show_note(self, text: str) -> None:
        spent_s = monotonic() - self._created_s
        print(_clock(spent_s) + text, file=self._stream, flush=True)


_STYLE_OF_LINES = {
    "pace": "", "val": "", "validate": "bold", "test": "bold", "end": "bold green",
}  # fmt: skip


class Bar(Progress):
    """A live bar with the newest numbers under it; validations stay above it as lines.

    Drawn by the training thread, at most 5 times a second: no thread of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._console = Console(file=stream, highlight=False)
        self._live: Live | None = None

    def _interval_s(self) -> float:
        return _FRAME_EVERY_S

    def _begin(self) -> None:
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, event: str, facts: dict[str, Any]) -> None:
        style = _STYLE_OF_LINES.get(event)
        if style is not None:
            clock = Text(_clock(facts["time_s"]), style="dim")
            self._console.print(clock.append(_sentence(event, facts), style=style), soft_wrap=True)
        if self._live is not None and event != "pace":
            self._live.update(_frame(facts), refresh=True)

    def _show_note(self, text: str) -> None:
        clock = Text(_clock(monotonic() - self._created_s), style="dim")
        self._console.print(clock.append(text, style="none"), soft_wrap=True)


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
        Text(_of("epoch", facts["epoch"], facts["max_epochs"]), style="bold"),
        ProgressBar(total=total, completed=facts["step"], complete_style="cyan"),
        Text(_of("", facts["step"], total), style="dim"),
        Text(left, style="cyan"),
    )
    row = Text("  ", no_wrap=True, overflow="ellipsis")
    for name, value in _numbers(facts, "loss", "acc", "best", "speed", "wait"):
        row.append(f"{name} ", style="dim").append(value.strip()).append("   ")
    if "doing" in facts:
        row.append(f"{facts['doing']} {facts['batch']}/{facts['batches'] or '?'}", style="yellow")
    return Group(bar, row)


def _sentence(event: str, facts: dict[str, Any]) -> str:
    """One line for a log; columns keep their place over a run."""
    if event in ("test", "validate"):
        split = {"test": "test", "validate": "val"}[event]
        numbers = _numbers(facts, *(f"{split}/{key}" for key in ("loss", "acc", "top5")))
        return f"{event}  " + "  ".join(f"{name} {value}" for name, value in numbers)
    if event == "work":
        done, total = (f"{facts[key]:,}" for key in ("done", "total"))
        left = "-" if facts["left_s"] is None else duration_text(facts["left_s"])
        said = f"{done:>{len(total)}}/{total} {facts['unit']}  {facts['per_s']:,.0f}/s"
        return f"{said}  left {left}"
    if event == "pace":
        return f"an epoch ({facts['epoch_steps']:,} steps) takes {_about(facts['epoch_s'])}"
    if event == "end":
        return f"training ended at step {facts['step']} after {duration_text(facts['time_s'])}"
    where = _of("epoch", facts["epoch"], facts["max_epochs"])
    where += "  " + _of("step", facts["step"], facts["max_steps"])
    if event == "batch":
        where = f"{where}  " if facts["doing"] == "validating" and facts["step"] else ""
        return f"{where}{facts['doing']} {facts['batch']}/{facts['batches'] or '?'}"
    if event == "val":
        numbers = _numbers(facts, "val/loss", "val/acc", "val/top5", "best")
        return f"{where}  VAL  " + "  ".join(f"{name} {value}" for name, value in numbers)
    numbers = _numbers(facts, "loss", "acc", "speed", "wait", "left")
    return f"{where}       " + "  ".join(f"{name} {value}" for name, value in numbers)


_SHOWN = {
    "loss": ("loss", "train/loss", lambda v: f"{v:.4f}"),
    "acc": ("acc", "train/acc", lambda v: f"{v:.4f}"),
    "speed": ("images/s", "throughput/images_per_s", lambda v: f"{v:<7,.0f}"),
    "wait": ("data wait", "throughput/data_wait", lambda v: f"{v:4.0%}"),
    "left": ("left", "left_s", duration_text),
    "best": ("best val acc", "val/best_acc", lambda v: f"{v:.4f}"),
} | {
    f"{stage}/{key}": (key, f"{stage}/{key}", lambda v: f"{v:.4f}")
    for stage in ("val", "test")
    for key in ("loss", "acc", "top5")
}


def _numbers(facts: dict[str, Any], *shown: str) -> list[tuple[str, str]]:
    """(name, text) of those numbers that are known."""
    picked = [_SHOWN[name] for name in shown]
    return [(n, text(facts[key])) for n, key, text in picked if facts.get(key) is not None]


def _of(word: str, done: int, total: int | None) -> str:
    """`word done/total`, as wide as it will ever be."""
    if total is None:
        return f"{word} {done}".strip()
    return f"{word} {done:>{len(str(total))}}/{total}".lstrip()


def _clock(seconds: float) -> str:
    return f"[{duration_text(seconds):>7}] "


def _about(seconds: float) -> str:
    return f"about {seconds:.2g} s" if seconds < 10 else f"about {duration_text(seconds)}"


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
