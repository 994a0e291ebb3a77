"""Layers that are frozen, or are so until an epoch."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightship.models.classifier import ImageClassifier


class Freezing(Callback):
    """Freezes the layers of model.freeze, and unfreezes them at the start of model.unfreeze_epoch.

    A function of the epoch alone, so that a resumed run does the same. All parameters are in the
    optimizer from the start, which skips those without gradients: its state needs no change.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Same as at the start of an epoch, which a resume within an epoch skips."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze or unfreeze; every rank, blocks where that is a change."""
        changed = cast(ImageClassifier, pl_module).freeze_for(trainer.current_epoch)
        strategy = trainer.strategy
        if changed and isinstance(strategy, DDPStrategy):
            # DDP reduces the gradients of those parameters that had one when it was made.
            strategy.model = pl_module
            strategy.configure_ddp()
