"""A loss that is not finite: reported once, or the end of the run."""

import logging
import math
from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightship.distributed import comm
from lightship.errors import Diverged
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.training.callbacks.early_stopping import EarlyStopping

logger = logging.getLogger(__name__)


class Divergence(Callback):
    """Looks at the loss wherever it has been fetched: at log points and after validations.

    So it never waits for the device, and the first step at which a loss was seen not to be finite
    is that of a log point. Losses are those of all ranks, so all ranks decide alike.

    Args:
        action: What follows: a warning (warn), or the end of the run (stop).
        table: The run's metrics, in which earlier losses are looked up. Rank 0's are complete.
        early_stopping: The run's, called before this; None: it has none.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"],
        table: MetricsCSV,
        early_stopping: EarlyStopping | None = None,
    ) -> None:
        self._action, self._table, self._early_stopping = action, table, early_stopping
        self._reported = False

    def look(self, split: str, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Look at the loss of a split, which the table has already. Every rank, at the same steps.

        Raises:
            Diverged: The loss is not finite, and that is to end the run.
        """
        loss, acc = (float(metrics.get(f"{split}/{name}", 0.0)) for name in ("loss", "acc"))
        if math.isfinite(loss) or not math.isfinite(acc):  # neither is one over no images at all
            return
        told = self._told(f"{split}/loss", loss, step)
        if self._action == "stop":
            raise Diverged(
                f"{told}; stopped by --trainer.on_nonfinite stop, with all checkpoints kept. "
                "Lower --optim.lr or set --trainer.gradient_clip_val, in another --run.output"
            )
        has_ended = self._early_stopping is not None and self._early_stopping.has_ended
        if (not self._reported or has_ended) and comm.is_rank_0():
            self._reported = True
            logger.warning(
                f"{told}; {self._effect(has_ended)}, and the best checkpoint always has a finite "
                "loss. Lower --optim.lr or set --trainer.gradient_clip_val, in another --run.output"
            )

    def _effect(self, has_ended: bool) -> str:
        """What the run does."""
        if has_ended:
            return "early stopping ends the run"
        if self._early_stopping is not None and self._early_stopping.monitor == "val/loss":
            return "early stopping ends the run if the next val/loss is not finite either"
        return "--trainer.on_nonfinite warn does not end the run"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation's loss."""
        metrics = {str(name): value for name, value in trainer.callback_metrics.items()}
        self.look("val", metrics, trainer.global_step)

    def _told(self, name: str, loss: float, step: int) -> str:
        rows = [(int(row["step"]), row[name]) for row in self._table.rows if name in row]
        finite = [at for at, value in rows if math.isfinite(value)]
        last = finite[-1] if finite else -1
        first = next((at for at, value in rows if at > last and not math.isfinite(value)), step)
        since = f"last finite at step {last}" if finite else "never finite before"
        return f"training diverged: {name} is not finite ({loss}) since step {first} ({since})"
