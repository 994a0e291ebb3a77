"""Buffers of a net (BatchNorm's running statistics) made those of rank 0 where they matter."""

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy


class SyncBuffers(Callback):
    """Gives every rank rank 0's buffers before a validation.

    In training each rank keeps statistics of its own share, and nothing is sent in a step (DDP
    would send rank 0's before each forward). Rank 0's are what a checkpoint holds, so they are
    what a validation must measure. Goes after EMA, whose averages stand in by then.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send them, rank by rank the same."""
        if isinstance(trainer.strategy, DDPStrategy):  # on XLA there is one of each for all ranks
            for buffer in pl_module.net.buffers():  # type: ignore[union-attr]
                dist.broadcast(buffer, src=0)
