"""Random numbers as a function of the step, so that no generator state is saved or restored."""

import hashlib
import random
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship import devices

_64_BITS = 2**64 - 1


class StepSeeding(Callback):
    """Reseeds Python, NumPy and torch before every batch from (seed, rank, epoch, batch).

    So dropout and any other random layer draw the same after a resume within an epoch, without
    generator states in the checkpoint.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch_key = (-1, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of the CPU and of this device."""
        epoch = trainer.current_epoch
        if self._epoch_key[0] != epoch:
            place = f"{self.seed} {trainer.global_rank} {epoch}"
            # Not hash(), which may change with a version of Python.
            digest = hashlib.blake2b(place.encode(), digest_size=8).digest()
            self._epoch_key = epoch, int.from_bytes(digest, "little")
        key = _mix(self._epoch_key[1] + batch_idx)
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        devices.of(pl_module.device).seed(key)


def _mix(number: int) -> int:
    """64 bits that neighbouring numbers do not share (splitmix64; Steele et al., OOPSLA 2014)."""
    z = number * 0x9E3779B97F4A7C15 & _64_BITS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _64_BITS
    return z ^ z >> 31
