"""Saves a checkpoint after each epoch, every N steps, every T seconds and on a stop request."""

import logging
import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightship.checkpoint.policy import CheckpointPolicy
from lightship.checkpoint.resumable import check_resumable
from lightship.checkpoint.store import CheckpointStore
from lightship.distributed import comm
from lightship.distributed.agreement import Agreement
from lightship.distributed.signals import RESPONSES, Phase, StopRequest
from lightship.errors import Preempted
from lightship.tracking.metrics_csv import MetricsCSV

logger = logging.getLogger(__name__)


class Checkpointing(Checkpoint):
    """Saves checkpoints through the store, and ends the run on a stop request. Every rank.

    A checkpoint holds all that an exact resume needs: besides Lightning's own state the metrics so
    far, whether early stopping has ended the run, and loop counters that Lightning resumes from
    exactly (see `_settle`). A stop request takes effect after the current step, also an epoch's
    last, or the current validation batch; in the validation that ends a run bounded by max_steps,
    after that validation.

    Args:
        store: Where checkpoints go.
        facts: Recorded in each checkpoint under "lightship" (plain values).
        stop: True once a signal asks this process to stop.
        table: The run's metrics, saved in each checkpoint and restored from it.
        monitor: Metric recorded as the score of a checkpoint after validation; None: there is no
            validation.
        bound: How much a crash may lose, and so when to save within an epoch.
        agree_every_steps: Steps (or validation batches) between two agreements of the ranks; the
            time bound and stop requests take effect that much later at most.
    """

    def __init__(
        self,
        store: CheckpointStore,
        facts: dict[str, Any],
        stop: StopRequest,
        table: MetricsCSV,
        monitor: str | None,
        bound: CheckpointPolicy,
        agree_every_steps: int = 8,
    ) -> None:
        self.store, self.facts, self.stop = store, facts, stop
        self.table, self.monitor = table, monitor
        self.bound = bound
        self.agreement = Agreement(agree_every_steps)
        self._validated = False
        self._score: float | None = None
        self._seen_step = -1
        self._has_warned = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore what Lightning does not: the metrics, and whether early stopping has fired.

        Lightning restores its loops later, from what this leaves in `checkpoint`.

        Raises:
            ConfigError: See `check_resumable`.
        """
        check_resumable(checkpoint)
        kept = checkpoint["lightship"]
        self.table.load_rows(kept["metrics"])
        _count_in_parts(
            checkpoint["loops"]["fit_loop"],
            trainer.accumulate_grad_batches,
            kept.get("accumulate_grad_batches"),
        )
        # Unless early stopping is off now. A longer patience: see EarlyStopping.on_fit_start.
        trainer.should_stop = kept["should_stop"] and bool(trainer.early_stopping_callbacks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and from here on save a checkpoint before a signal ends the process."""
        self.stop.begin_training()
        self.agreement.open()
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.completed:
            trainer.fit_loop.epoch_loop.restarting = False  # a new epoch: nothing to resume
        self._seen_step = trainer.global_step
        self.bound.start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if due; after an epoch's last step only if a validation comes before the end."""
        step = trainer.global_step
        if step == self._seen_step:
            return  # a part of a global batch, not a step
        self._seen_step = step
        stop, late = self._agree(step, bool(self.stop), self.bound.is_late())
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last and not self._can_resume_into_validation(trainer):
            return  # on_train_epoch_end is next
        if self.bound.is_due(step) or late or stop or step == trainer.max_steps:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Act on a stop request; the resumed run repeats the validation from its first batch."""
        batch_idx = args[2]
        if trainer.state.fn != TrainerFn.FITTING or not self._can_resume_into_validation(trainer):
            return
        [stop] = self.agreement.any_rank(batch_idx, bool(self.stop))
        if stop:
            if self.bound.begun_step != trainer.global_step:
                self._save(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score for the checkpoint that ends the epoch."""
        assert self.monitor is not None
        score, loss = (float(trainer.callback_metrics[name]) for name in (self.monitor, "val/loss"))
        # Accuracy is finite even if no output of the net is.
        is_finite = math.isfinite(score) and math.isfinite(loss)
        self._validated, self._score = True, score if is_finite else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished epoch, with its score, after early stopping has decided."""
        [stop] = self.agreement.any_rank(0, bool(self.stop))
        if self._validated or self.bound.begun_step != trainer.global_step:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the commit record and a resume need."""
        checkpoint["lightship"] = {
            **self.facts,
            "score": self._score,
            "metrics": self.table.rows,
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        checkpoint["epoch"] = _settle(checkpoint["loops"]["fit_loop"])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait for the checkpoint being written; if that fails too, log it."""
        try:
            self.store.wait()
        except Exception as failure:
            logger.warning(f"the last checkpoint also failed: {type(failure).__name__}: {failure}")

    def _can_resume_into_validation(self, trainer: Trainer) -> bool:
        """Whether this epoch ends with a validation that a resumed run would reach.

        Lightning does not start at all once max_steps are done.
        """
        if self.monitor is None or trainer.global_step == trainer.max_steps:
            return False
        assert trainer.check_val_every_n_epoch is not None
        return (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0

    def _save(self, trainer: Trainer) -> None:
        comm.on_rank_0(self.store.wait)  # for the save before, which may take long
        trainer.save_checkpoint(self.store.path_of_step(trainer.global_step))
        self._validated, self._score = False, None
        self.bound.save_begun(trainer.global_step)
        self._agree(trainer.global_step)  # if no step may be lost

    def _agree(self, step: int, *flags: bool) -> list[bool]:
        """Agree on flags, and on blocking on a write that takes too long. Every rank.

        Rank 0 writes, and the others wait for it, however long it takes: see `comm.on_rank_0`.

        Raises:
            LightshipError: The last checkpoint could not be written.
        """
        may_block = self.bound.may_be_reached(step)
        *agreed, block = self.agreement.any_rank(
            step, *flags, self._must_block(step), now=may_block
        )
        if block:
            began_s = time.monotonic()
            comm.on_rank_0(self.store.wait)
            self._warn_of_blocking(time.monotonic() - began_s)
        if block or may_block:
            self.bound.all_durable()
        return agreed

    def _must_block(self, step: int) -> bool:
        """Whether a write of this rank takes too long. Raises the error of one that failed."""
        if self.store.is_saving:
            return self.bound.is_reached(step)
        self.store.wait()
        self.bound.save_durable()
        return False

    def _warn_of_blocking(self, waited_s: float) -> None:
        """Once, for more than a second."""
        if waited_s > 1 and not self._has_warned and comm.is_rank_0():
            self._has_warned = True
            logger.warning(
                f"training blocked {waited_s:.1f} s on a checkpoint write; to avoid it, raise "
                "--run.checkpoint_every_s or --run.checkpoint_every_steps"
            )

    def _leave(self, trainer: Trainer) -> None:
        comm.on_rank_0(self.store.wait)  # the first rank to exit ends the writer too
        response = RESPONSES[Phase.TRAINING]
        raise Preempted(response.text(self.stop.number, trainer.global_step))


def _settle(fit_loop: dict[str, Any]) -> int:
    """Set the loop counters so that Lightning resumes right after what is done.

    Returns:
        Number of finished epochs.
    """
    # With its own counters Lightning (2.6) resumes from an epoch's last batch without the
    # validation, and from an epoch's end by repeating that end. So: mark a finished epoch as
    # completed, and after a last batch mark the validation as started with no batch done.
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    closed = epoch["current"]["processed"] == epoch["current"]["ready"]
    for part in ("total", "current"):
        if closed:
            epoch[part]["completed"] = epoch[part]["processed"]
        elif batch["is_last_batch"]:
            batch[part]["completed"] = batch[part]["processed"]
            fit_loop["epoch_loop.val_loop.batch_progress"][part].update(
                ready=1, started=1, processed=0, completed=0
            )
    return epoch["current"]["completed"]


def _count_in_parts(fit_loop: dict[str, Any], parts: int, parts_before: int | None) -> None:
    """Convert the batch counters, and so the position in the epoch, to this start's parts a step.

    Lightning counts the parts of global batches. A checkpoint is saved after whole steps.

    Args:
        fit_loop: State of Lightning's loop, as saved; changed in place.
        parts: Parts of each step from now on (`accumulate_grad_batches`).
        parts_before: Those of the start that saved it; None: an older version did not store them.
    """
    batch = fit_loop["epoch_loop.batch_progress"]
    if parts_before is None:
        progress = fit_loop["epoch_loop.automatic_optimization.optim_progress"]
        steps = progress["optimizer"]["step"]["current"]["ready"]
        parts_before = batch["current"]["ready"] // steps
    if parts == parts_before:
        return
    for counts in (batch["total"], batch["current"]):
        open_parts = counts["processed"] - counts["completed"]  # 1 within on_train_batch_end
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // parts_before * parts
        counts["completed"] = counts["processed"] - open_parts
