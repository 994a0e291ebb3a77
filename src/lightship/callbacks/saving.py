"""When a checkpoint is saved: at each validation, every N steps, every T seconds, and at a stop."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightship.callbacks.preemption import Agreement, StopRequest
from lightship.checkpoint import CheckpointStore
from lightship.exits import Preempted


class Saving(Checkpoint):
    """Saves through the store, and ends the run when asked to stop. All ranks decide alike.

    Args:
        store: Where checkpoints go.
        facts: Recorded in each checkpoint under "lightship" (plain values).
        stop: Set when this process is asked to stop.
        monitor: Metric recorded as the score of a save that follows a validation.
        every_steps: Save also every so many optimizer steps; None: do not.
        every_s: Save also when so many seconds have passed since the last; None: do not.
        agree_every_steps: Steps between two agreements of several ranks (the time bound and a stop
            are acted on that much later at most).
    """

    def __init__(
        self,
        store: CheckpointStore,
        facts: dict[str, Any],
        stop: StopRequest,
        monitor: str,
        every_steps: int | None,
        every_s: float | None,
        agree_every_steps: int = 8,
    ) -> None:
        self.store, self.facts, self.stop, self.monitor = store, facts, stop, monitor
        self.every_steps, self.every_s = every_steps, every_s
        self.agreement = Agreement(agree_every_steps)
        self._score: float | None = None
        self._saved_step = -1
        self._saved_at_s = 0.0
        self._seen_step = 0
        self._stopping = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and undo Lightning's signal handling, which talks in the handler."""
        self.agreement.open()
        self.stop.install()
        # Its broadcast + `.item()` would synchronise every step; Agreement does that work.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._seen_step = self._saved_step = trainer.global_step
        self._saved_at_s = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if due, except after an epoch's last step: the save then waits for the validation.

        Lightning resumes from a save between the two by leaving the validation out.
        """
        step = trainer.global_step
        if step == self._seen_step:
            return  # a part of a global batch, not a step
        self._seen_step = step
        self.store.raise_failure()
        late = self.every_s is not None and time.monotonic() - self._saved_at_s >= self.every_s
        stop, late = self.agreement.any_rank(step, bool(self.stop), late)
        due = self.every_steps is not None and step % self.every_steps == 0
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._stopping = self._stopping or stop
        if (due or late or stop) and not last:
            self._save(trainer)
            self._leave_if_stopping(step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the validation's score."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            score = trainer.callback_metrics.get(self.monitor)
            self._save(trainer, None if score is None else float(score))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save an epoch that no validation closed."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._leave_if_stopping(trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the commit record and a later start need."""
        checkpoint["lightship"] = {**self.facts, "score": self._score}

    def _leave_if_stopping(self, step: int) -> None:
        if self._stopping:
            self.store.wait()
            raise Preempted(f"asked to stop: step {step} is saved; run the same command to go on")

    def _save(self, trainer: Trainer, score: float | None = None) -> None:
        self._score = score
        trainer.save_checkpoint(self.store.path_of_step(trainer.global_step))
        self._saved_step, self._saved_at_s = trainer.global_step, time.monotonic()
