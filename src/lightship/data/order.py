"""Which samples make up which global batch: a pure function of (seed, epoch, set, batch size).

Nothing here knows of ranks, workers or storage. A rank takes its slice of a global batch, so the
same samples meet in the same step on any number of processes, and the whole state of the input
pipeline is the number of steps done.
"""

import functools

import numpy as np

from lightship.exits import ConfigError


class Order:
    """The sample ids of every global training batch.

    Args:
        num_samples: Size of the training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.

    Raises:
        ConfigError: The batch is larger than the split.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int) -> None:
        if global_batch_size > num_samples:
            raise ConfigError(
                f"--data.global_batch_size is {global_batch_size}, but the training split has only "
                f"{num_samples} images; it must be at most {num_samples}"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch; the permutation's remainder is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left out of an epoch (other ones in each) so that every batch is full."""
        return self.num_samples % self.global_batch_size

    def epoch(self, epoch: int) -> np.ndarray:
        """Ids of an epoch, [steps_per_epoch, global_batch_size] int64, read-only."""
        ids = permutation(self.num_samples, self.seed, epoch)
        full = self.steps_per_epoch * self.global_batch_size
        return ids[:full].reshape(self.steps_per_epoch, self.global_batch_size)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Ids of global batch `step` of `epoch`, [global_batch_size] int64, read-only."""
        return self.epoch(epoch)[step]


def share(global_ids: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Contiguous slice `part` of `parts` equal ones of the last axis of `global_ids`.

    Raises:
        ConfigError: The global batch does not divide.
    """
    size = global_ids.shape[-1]
    if size % parts:
        raise ConfigError(
            f"--data.global_batch_size {size} is not divisible by {parts} "
            "(devices x nodes x --trainer.accumulate_grad_batches)"
        )
    width = size // parts
    return global_ids[..., part * width : (part + 1) * width]


@functools.lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(num_samples), [num_samples] int64, read-only.

    Sorting raw Philox words, whose values NumPy fixes for good, and not `Generator.permutation`,
    whose stream may change between NumPy versions: a run must be resumable after an upgrade.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    ids = np.argsort(keys, kind="stable")
    ids.flags.writeable = False
    return ids
