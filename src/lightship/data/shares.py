"""The batches of one rank: its share of the training order, or of an evaluation.

A share gives any of its batches, and where a sample comes in it, in time and memory of the answer.
"""

import functools
from dataclasses import dataclass

import numpy as np

from lightship.data.batch import NOT_COUNTED
from lightship.data.order import Order
from lightship.errors import ConfigError


@dataclass
class TrainShare:
    """One rank's training batches.

    Attributes:
        order: The global batches.
        rank: This process, 0 to world_size - 1.
        world_size: Processes that share a global batch.
        parts: Parts (gradient accumulation) each rank's share is cut into.
        chips: Devices that each process drives.

    Raises:
        ConfigError: The global batch is not divisible by these (on construction).
    """

    order: Order
    rank: int
    world_size: int
    parts: int
    chips: int = 1

    def __post_init__(self) -> None:
        size, devices = self.order.global_batch_size, self.world_size * self.chips
        for divisor in (devices, devices * self.parts):
            if size % divisor:
                raise ConfigError(
                    f"--data.global_batch_size {size} is not divisible by {divisor} "
                    "(devices x nodes x --trainer.accumulate_grad_batches)"
                )

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.parts

    @property
    def batch_size(self) -> int:
        """Samples in each of this rank's batches."""
        return self.order.global_batch_size // self.world_size // self.parts

    def batches(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Ids of batches `start` to `stop` of an epoch, [stop - start, batch_size] int64."""
        size, width = self.order.global_batch_size, self.batch_size
        step, part = np.divmod(np.arange(start, stop), self.parts)
        firsts = step * size + (self.rank * self.parts + part) * width
        places = firsts[:, None] + np.arange(width)
        return self.order.ids(epoch, places.ravel()).reshape(places.shape)

    def batches_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """In which batch of an epoch each sample comes, [M] int64; -1: in none of this rank's."""
        places = self.order.places(epoch, ids)
        step, row = np.divmod(places, self.order.global_batch_size)
        part = row // self.batch_size - self.rank * self.parts
        is_mine = (places >= 0) & (part >= 0) & (part < self.parts)
        return np.where(is_mine, step * self.parts + part, -1)


@dataclass
class EvalShare:
    """One rank's evaluation batches: every sample exactly once over all ranks, in order.

    All ranks make the same number of batches of one size; padding is NOT_COUNTED.

    Attributes:
        num_samples: Size of the split.
        max_batch_size: Bound of a batch.
        rank: This process, 0 to world_size - 1.
        world_size: Processes that share the split.
    """

    num_samples: int
    max_batch_size: int
    rank: int
    world_size: int

    @property
    def _per_rank(self) -> int:
        return -(-self.num_samples // self.world_size)

    @property
    def _first(self) -> int:
        return self.rank * self._per_rank

    @property
    def batch_size(self) -> int:
        """Rows of each batch."""
        return min(self.max_batch_size, self._per_rank)

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch_size)

    def batches(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Ids of batches, [stop - start, batch_size] int64, the same in every epoch."""
        ids = self._first + np.arange(start * self.batch_size, stop * self.batch_size)
        is_mine = self._is_mine(ids)
        return np.where(is_mine, ids, NOT_COUNTED).reshape(stop - start, self.batch_size)

    def batches_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """In which batch each sample comes, [M] int64; -1: in none of this rank's."""
        return np.where(self._is_mine(ids), (ids - self._first) // self.batch_size, -1)

    def _is_mine(self, ids: np.ndarray) -> np.ndarray:
        end = min(self._first + self._per_rank, self.num_samples)
        return (ids >= self._first) & (ids < end)


@dataclass(frozen=True)
class ListedShare:
    """One rank's evaluation batches, listed.

    Attributes:
        listed: [K, B] int64 ids, each sample at most once; NOT_COUNTED in padding.
    """

    listed: np.ndarray

    @property
    def batch_size(self) -> int:
        """Rows of each batch."""
        return self.listed.shape[1]

    def __len__(self) -> int:
        return len(self.listed)

    def batches(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Ids of batches, [stop - start, batch_size] int64, the same in every epoch."""
        return self.listed[start:stop]

    def batches_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """In which batch each sample comes, [M] int64; -1: in none."""
        if not self.listed.size:
            return np.full(len(ids), -1)
        in_order, places = self._sorted
        found = np.minimum(np.searchsorted(in_order, ids), len(in_order) - 1)
        return np.where(in_order[found] == ids, places[found] // self.batch_size, -1)

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        places = np.argsort(self.listed, axis=None, kind="stable")
        return self.listed.ravel()[places], places
