"""Training metrics at each log point: loss, accuracy, speed and data wait, in one device fetch."""

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship import devices
from lightship.training.callbacks.divergence import Divergence


class Throughput(Callback):
    """Logs every `log_every_n_steps` optimizer steps, after each epoch and at the end.

    A log point takes the module's sums (`take_train_sums`: the one fetch from the device, which
    also waits for it, so the times hold for an asynchronous device), adds

    - `throughput/images_per_s`: images of the whole job,
    - `throughput/step_ms`: wall time of an optimizer step,
    - `throughput/data_wait`: fraction of the wall time between the end of one batch and the start
      of the next; callbacks after this one count too, so it goes last,
    - `lr`: learning rate of the next step (first parameter group),
    - `memory/max_gib`: on CUDA, peak memory of tensors so far,

    passes all to every logger with the trainer's `global_step`, and puts it in
    `trainer.callback_metrics` as CPU tensors. Between log points it only adds floats. Times exclude
    validation. Every rank, at the same steps.
    """

    def __init__(
        self,
        global_batch_size: int,
        log_every_n_steps: int,
        divergence: Divergence | None = None,
    ) -> None:
        """See the class.

        Args:
            global_batch_size: images per optimizer step over all ranks and accumulation.
            log_every_n_steps: optimizer steps between two log points.
            divergence: checks the loss of each log point.
        """
        self._global_batch_size = global_batch_size
        self._log_every_n_steps = log_every_n_steps
        self._divergence = divergence
        self._seen_step = 0
        self._open_window(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the window here: a resume within an epoch does not call on_train_epoch_start."""
        self._seen_step = trainer.global_step
        self._open_window(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new window: time between two epochs is not training."""
        self._open_window(trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the wait for this batch."""
        self._waited_s += perf_counter() - self._batch_ended_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if due."""
        step = trainer.global_step
        if step != self._seen_step:
            self._seen_step = step
            ends = trainer.is_last_batch or step == trainer.max_steps
            if step % self._log_every_n_steps == 0 or ends:
                self._log(trainer, pl_module)
        self._batch_ended_s = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clocks."""
        self._validation_began_s = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the clocks."""
        spent_s = perf_counter() - self._validation_began_s
        self._window_began_s += spent_s
        self._batch_ended_s += spent_s

    def _open_window(self, step: int) -> None:
        self._window_step = step
        self._waited_s = 0.0
        self._window_began_s = self._batch_ended_s = perf_counter()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: dict[str, float] = pl_module.take_train_sums()  # type: ignore[operator]
        steps = trainer.global_step - self._window_step
        wall_s = perf_counter() - self._window_began_s
        metrics = metrics | {
            "throughput/images_per_s": steps * self._global_batch_size / wall_s,
            "throughput/step_ms": 1000 * wall_s / steps,
            "throughput/data_wait": self._waited_s / wall_s,
            "lr": _rate_before_scaling(trainer),
        }
        peak_bytes = devices.of(trainer.strategy.root_device).peak_bytes()
        if peak_bytes is not None:
            metrics["memory/max_gib"] = peak_bytes / 2**30
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, trainer.global_step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
        if self._divergence is not None:
            self._divergence.look("train", metrics, trainer.global_step)
        self._open_window(trainer.global_step)


def _rate_before_scaling(trainer: Trainer) -> float:
    """The learning rate of optim.lr's schedule, not of a layer with a factor of its own."""
    group = trainer.optimizers[0].param_groups[0]
    return float(group["lr"]) / group.get("lr_scale", 1.0)
