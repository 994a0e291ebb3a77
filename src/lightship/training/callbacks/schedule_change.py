"""The learning rate of a resumed run whose number of steps has changed."""

import logging
import math

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


class ScheduleChange(Callback):
    """Sets the rate that the schedule has at the step resumed from, and says how it changed.

    A schedule is a function of the step and of the run's number of steps. With more epochs it is
    stretched, so that the rate goes up again; without this the first step would have the old rate.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the checkpoint's rate with the schedule's."""
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                self._follow(config.scheduler, trainer)

    def _follow(self, scheduler: LambdaLR, trainer: Trainer) -> None:
        changed = []
        step = scheduler.last_epoch
        for group, peak, scale in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            was, now = float(group["lr"]), float(peak * scale(step))
            if not math.isclose(was, now, rel_tol=1e-6, abs_tol=1e-12):
                changed.append((was, now))
                group["lr"] = group["lr"].fill_(now) if hasattr(group["lr"], "fill_") else now
        if changed:
            was, now = changed[0]
            logger.info(
                f"learning-rate schedule now spans {trainer.estimated_stepping_batches:g} steps: "
                f"the rate at step {step} changes from {was:.3g} to {now:.3g}"
            )
