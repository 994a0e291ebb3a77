"""Random numbers of a step as a function of the step: nothing to save, nothing to restore."""

import hashlib
import random
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship import devices


class StepSeeding(Callback):
    """Reseeds Python, NumPy and torch before every batch from (seed, rank, epoch, batch).

    Dropout and whatever else a net draws is then the same after a restart in the middle of an
    epoch, without any generator's state in the checkpoint.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators the step may use, on the CPU and this device only."""
        place = f"{self.seed} {trainer.global_rank} {trainer.current_epoch} {batch_idx}"
        # Not hash(): a run must be resumable after an upgrade of Python.
        digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        devices.of(pl_module.device).seed(key)
