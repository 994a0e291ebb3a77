"""Early stopping whose patience may change when a run is resumed.

It also ends the run where the monitored loss is not finite (Lightning's `check_finite`).
"""

from collections.abc import Collection
from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lightship.checkpoint.record import Metric
from lightship.config import TrainerConfig
from lightship.errors import ConfigError
from lightship.models.metrics import LOGGED


def check_monitor(config: TrainerConfig, splits: Collection[str], num_classes: int) -> None:
    """Raise ConfigError for a metric that is not logged, or early stopping without validation."""
    if config.monitor == "val/top5" and num_classes <= 5:
        others = ", ".join(f"val/{name}" for name in LOGGED if name != "top5")
        raise ConfigError(
            f"--trainer.monitor is val/top5, which needs more than 5 classes; --data.root has "
            f"{num_classes}: choose one of {others}"
        )
    if config.early_stopping_patience and "val" not in splits:
        raise ConfigError(
            "--trainer.early_stopping_patience needs a validation split, and --data.root has "
            "none: set --data.val_fraction, or a patience of 0"
        )


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, but with the configured patience on resume; Lightning uses the checkpoint's."""

    @classmethod
    def of(cls, config: TrainerConfig) -> "EarlyStopping":
        """From the trainer's settings; the patience is at least 1."""
        return cls(
            config.monitor,
            patience=config.early_stopping_patience,
            mode=Metric.of(config.monitor).mode,
            check_on_train_epoch_end=False,  # an epoch that max_steps ends early has no validation
        )

    @property
    def has_ended(self) -> bool:
        """Whether it has ended the run."""
        return self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count, but not the patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a run that a shorter patience has ended."""
        if (
            self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
            and self.wait_count < self.patience
        ):
            trainer.should_stop = False
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
