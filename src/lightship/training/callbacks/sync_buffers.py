"""Broadcasts a net's buffers (BatchNorm's running statistics) from rank 0."""

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy


class SyncBuffers(Callback):
    """Broadcasts rank 0's buffers before a validation.

    In training each rank keeps statistics of its own samples, and a step sends none (DDP would
    broadcast before each forward pass). A checkpoint holds rank 0's, so a validation must use them.
    Goes after EMA, which swaps in its averages first.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Broadcast. Every rank; blocks."""
        if isinstance(trainer.strategy, DDPStrategy):  # on XLA all ranks share one copy
            for buffer in pl_module.net.buffers():  # type: ignore[union-attr]
                dist.broadcast(buffer, src=0)
