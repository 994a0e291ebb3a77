"""Follows training and evaluation, and shows what is due on the command's display."""

import math
from collections.abc import Mapping
from time import monotonic
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightship.console.display import Display, build_display, finite

_VALIDATION_LINE_EVERY_S = 2.0
_PACE_KNOWN_AFTER_S = 5.0


def build_progress(
    log_format: str, monitor: str = "val/loss", stream: TextIO | None = None
) -> "Progress":
    """The progress callback; give the Trainer `enable_progress_bar=False` beside it.

    Args:
        log_format: See `build_display`.
        monitor: The metric that decides which validation was the best.
        stream: See `build_display`.
    """
    return Progress(build_display(log_format, stream), monitor)


class Progress(Callback):
    """Shows training and evaluation. Rank 0 only.

    It shows numbers that are on the host already (those of the last log point, and what the
    loggers were given at a validation), so it never synchronizes with the device. Validations are
    shown every 2 s at most. One line tells how long an epoch takes, once that is known.

    Attributes:
        display: Where events are shown.
    """

    def __init__(self, display: Display, monitor: str) -> None:
        self.display, self._monitor = display, monitor
        self._validation_shown_s = -math.inf
        self._held_back = False
        self._best: tuple[float, int] | None = None
        self._shown_numbers: float | None = None
        self._first_step = 0
        self._train_began_s = self._first_batch_done_s = display.began_s
        self._batches = 0  # until the pace is shown
        self._pace_is_shown = False
        self._total_steps = math.inf
        self._evaluation_began_s = display.began_s

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where this process began, for the time left, and the run's best so far."""
        self._first_step, self._train_began_s = trainer.global_step, monotonic()
        self._total_steps = float(trainer.estimated_stepping_batches)
        for logger in trainer.loggers:
            for row in getattr(logger, "rows", ()):
                if self._monitor in row and "epoch" in row:  # else a callback of the user's
                    self._note_best(row, int(row["epoch"]) + 1)
        if trainer.is_global_zero:
            self.display.begin()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show training, if it is time."""
        if not trainer.is_global_zero:
            return
        if not self._pace_is_shown:
            self._show_pace(trainer)
        if self.display.is_due():
            self.display.show("train", self._newer(self._facts(trainer)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation's result, unless the last was just shown."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end_evaluation(trainer, "validate")
            return
        values = _host_values(trainer)
        if self._monitor in values:
            self._note_best(values, trainer.current_epoch + 1)
        now = monotonic()
        self._held_back = now - self._validation_shown_s < _VALIDATION_LINE_EVERY_S
        if not self._held_back:
            self._validation_shown_s = now
            self.display.postpone()
            self.display.show("val", self._facts(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the screen, outside of a fit, which has it already."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._begin_evaluation(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the screen."""
        self._begin_evaluation(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the test's result, and give the screen back."""
        if trainer.is_global_zero:
            self._end_evaluation(trainer, "test")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show how far a long validation is."""
        self._show_batch(trainer, "validating", args[3], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Show how far a long test is."""
        self._show_batch(trainer, "testing", args[3], trainer.num_test_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last numbers, and give the screen back."""
        if trainer.is_global_zero:
            if self._held_back:
                self.display.show("val", self._facts(trainer))
            self.display.show("end", self._facts(trainer))
            self.display.end()

    def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Give the screen back."""
        if trainer.is_global_zero:
            self.display.end()

    def _begin_evaluation(self, trainer: Trainer) -> None:
        self._evaluation_began_s = monotonic()
        if trainer.is_global_zero:
            self.display.begin()

    def _end_evaluation(self, trainer: Trainer, event: str) -> None:
        self.display.show(event, self._results(trainer))
        self.display.end()

    def _show_pace(self, trainer: Trainer) -> None:
        """Show how long an epoch takes, by the batches after the first, which may have compiled."""
        now = monotonic()
        self._batches += 1
        if self._batches == 1:
            self._first_batch_done_s = now
            return
        spent_s = now - self._first_batch_done_s
        if spent_s >= _PACE_KNOWN_AFTER_S or trainer.is_last_batch:
            self._pace_is_shown = True
            batches = int(trainer.num_training_batches)
            steps = batches // trainer.accumulate_grad_batches
            epoch_s = spent_s / (self._batches - 1) * batches
            self.display.show("pace", {"epoch_steps": steps, "epoch_s": round(epoch_s, 3)})

    def _show_batch(self, trainer: Trainer, doing: str, batch_idx: int, sizes: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and self.display.is_due():
            [total] = sizes if isinstance(sizes, list) else [sizes]  # there is one loader
            done = batch_idx + 1
            facts: dict[str, Any] = {"doing": doing, "batch": done, "batches": _count(total)}
            if trainer.state.fn == TrainerFn.FITTING:
                facts = {**self._facts(trainer), **facts}
            else:
                spent_s = monotonic() - self._evaluation_began_s
                facts["left_s"] = finite(round(spent_s / done * (total - done), 3))
            self.display.show("batch", facts)

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
        if newest == self._shown_numbers and not self.display.repeats_numbers:
            old = ("train/", "throughput/", "lr")
            facts = {key: value for key, value in facts.items() if not key.startswith(old)}
        self._shown_numbers = newest
        return facts

    def _results(self, trainer: Trainer) -> dict[str, Any]:
        """Metrics of an evaluation outside a fit."""
        return {key: finite(value) for key, value in _host_values(trainer).items()}

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        """Everything a display may show, as plain values; None where not known."""
        step, now = trainer.global_step, monotonic()
        done, steps_left = step - self._first_step, self._total_steps - step
        left_s = (now - self._train_began_s) / done * steps_left if done > 0 else math.inf
        return {
            "epoch": trainer.fit_loop.epoch_progress.current.ready,
            "max_epochs": trainer.max_epochs if trainer.max_epochs != -1 else None,
            "step": step,
            "max_steps": _count(self._total_steps),
            "left_s": finite(left_s),
            "monitor": self._monitor,
            "best": self._best and self._best[0],
            "best_epoch": self._best and self._best[1],
            **{key: finite(value) for key, value in _host_values(trainer).items()},
        }


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
