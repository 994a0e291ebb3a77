"""When a checkpoint is saved: at an epoch's end, every N steps, every T seconds, at a stop."""

import logging
import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightship.checkpoint.policy import CheckpointPolicy
from lightship.checkpoint.store import CheckpointStore
from lightship.distributed.agreement import Agreement
from lightship.distributed.signals import RESPONSES, Phase, StopRequest
from lightship.errors import Preempted
from lightship.tracking.metrics_csv import MetricsCSV

logger = logging.getLogger(__name__)


class Checkpointing(Checkpoint):
    """Saves through the store, and ends the run when asked to stop. All ranks decide alike.

    A save holds all that a later start needs to go on as if nothing had been: beside Lightning's
    own state the metrics so far, whether early stopping has ended the run, and counters that
    Lightning resumes from exactly (see `_settle`). A stop is acted on after the step in hand, also
    an epoch's last, or the validation's batch in hand; in the validation that ends a run bounded by
    max_steps, after it.

    Args:
        store: Where checkpoints go.
        facts: Recorded in each checkpoint under "lightship" (plain values).
        stop: Set when this process is asked to stop.
        table: The run's metrics, kept in each checkpoint and put back from it.
        monitor: Metric recorded as the score of a save that closes a validated epoch; None: there
            is no validation.
        bound: What a kill may lose, and so when to save within an epoch.
        agree_every_steps: Steps (or validation batches) between two agreements of several ranks;
            the time bound and a stop are acted on that much later at most.
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
        self._told_of_waiting = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put back what Lightning does not: the metrics, and that early stopping has fired."""
        kept = checkpoint["lightship"]
        self.table.load_rows(kept["metrics"])
        # Early stopping that this start does not have ends nothing; its patience: see there.
        trainer.should_stop = kept["should_stop"] and bool(trainer.early_stopping_callbacks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and from here on let signals wait for a save."""
        self.stop.begin_training()
        self.agreement.open()
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.completed:
            trainer.fit_loop.epoch_loop.restarting = False  # a new epoch: nothing to go on with
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
        self._keep_within_bound(step)
        stop, late = self.agreement.any_rank(step, bool(self.stop), self.bound.is_late())
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
        """Stop if asked to: the validation is done again from its beginning."""
        batch_idx = args[2]
        if trainer.state.fn != TrainerFn.FITTING or not self._can_resume_into_validation(trainer):
            return
        [stop] = self.agreement.any_rank(batch_idx, bool(self.stop))
        if stop:
            if self.bound.begun_step != trainer.global_step:
                self._save(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the score for the save that closes the epoch."""
        assert self.monitor is not None
        score, loss = (float(trainer.callback_metrics[name]) for name in (self.monitor, "val/loss"))
        # Accuracy is finite even where no output of the net is.
        is_finite = math.isfinite(score) and math.isfinite(loss)
        self._validated, self._score = True, score if is_finite else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the closed epoch, with its score and after early stopping has judged it."""
        [stop] = self.agreement.any_rank(0, bool(self.stop))
        if self._validated or self.bound.begun_step != trainer.global_step:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the commit record and a later start need."""
        checkpoint["lightship"] = {
            **self.facts,
            "score": self._score,
            "metrics": self.table.rows,
            "should_stop": trainer.should_stop,
        }
        checkpoint["epoch"] = _settle(checkpoint["loops"]["fit_loop"])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the save in flight finish; if it fails too, both errors are told."""
        try:
            self.store.wait()
        except Exception as failure:
            logger.warning(f"the last checkpoint also failed: {type(failure).__name__}: {failure}")

    def _can_resume_into_validation(self, trainer: Trainer) -> bool:
        """Whether a validation ends this epoch that a restart would come to.

        Lightning does not begin at all where max_steps are done.
        """
        if self.monitor is None or trainer.global_step == trainer.max_steps:
            return False
        assert trainer.check_val_every_n_epoch is not None
        return (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.store.path_of_step(trainer.global_step))
        self._validated, self._score = False, None
        self.bound.save_begun(trainer.global_step)
        self._keep_within_bound(trainer.global_step)  # where not one step may be lost

    def _keep_within_bound(self, step: int) -> None:
        """Wait for a save that takes too long. Rank 0 alone writes; the others come to wait for it.

        Raises:
            LightshipError: The save in flight has failed.
        """
        if self.store.is_saving:
            if not self.bound.is_reached(step):
                return
            began_s = time.monotonic()
            self.store.wait()
            self._tell_of_waiting(time.monotonic() - began_s)
        self.store.wait()
        self.bound.save_durable()

    def _tell_of_waiting(self, waited_s: float) -> None:
        """Once, and not of what nobody would notice."""
        if waited_s > 1 and not self._told_of_waiting:
            self._told_of_waiting = True
            logger.warning(
                f"training blocked {waited_s:.1f} s on a checkpoint write, which takes longer than "
                "half of --run.checkpoint_every_steps or --run.checkpoint_every_s"
            )

    def _leave(self, trainer: Trainer) -> None:
        self.store.wait()
        trainer.strategy.barrier("saved")  # or the first to leave takes the writer with it
        response = RESPONSES[Phase.TRAINING]
        raise Preempted(response.text(self.stop.number, trainer.global_step))


def _settle(fit_loop: dict[str, Any]) -> int:
    """Make the counters say what is done, so that Lightning resumes right after it.

    Returns:
        Epochs done.

    """
    # As they stand at an epoch's last batch Lightning (2.6) resumes without the validation, and at
    # the epoch's end it goes through that end again. So: of an ended epoch nothing is open, and
    # after a last batch the validation has begun and done nothing.
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
