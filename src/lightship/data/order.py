"""Which samples make up which global batch: a pure function of (seed, epoch, set, batch size).

Nothing here depends on ranks, workers or storage. A rank takes its slice of a global batch, so the
same samples share a step on any number of processes, and the whole state of the input pipeline is
the number of steps done.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightship.data.batch import NOT_COUNTED
from lightship.data.manifest import Manifest
from lightship.errors import ConfigError

_MIN_SEGMENT_SAMPLES = 8
_MIX_BYTES = 4 * 2**30


class Order:
    """The sample ids of every global training batch.

    A set is shuffled as a whole or, given `block_edges`, so that it can be read in blocks of
    neighbouring samples: the blocks come in random order, cut into segments of equal length; every
    global batch takes equally many samples of each segment (so a rank whose share is whole segments
    reads each block alone), and within a segment each block is spread evenly, with a random offset,
    over as many batches as let every sample of a batch come from a different block.

    Args:
        num_samples: Size of the training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.
        block_edges: [K + 1] int64, from 0 to num_samples: sample i is in block k if
            edges[k] <= i < edges[k + 1] (`Manifest.block_edges`). None: no blocks.
        size_bytes: Size of the whole set; at most 4 GiB of blocks are mixed. Only for blocks.

    Attributes:
        mixed_blocks: Blocks that are spread over the same batches.
        mixed_bytes: Their size.

    Raises:
        ConfigError: The batch is larger than the split.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        block_edges: np.ndarray | None = None,
        size_bytes: int = 0,
    ) -> None:
        if global_batch_size > num_samples:
            raise ConfigError(
                f"--data.global_batch_size is {global_batch_size}, but the training split has only "
                f"{num_samples} images; it must be at most {num_samples}"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.block_edges = block_edges
        blocks = 0 if block_edges is None else len(block_edges) - 1
        max_blocks = max(1, int(_MIX_BYTES / max(1.0, size_bytes / max(1, blocks))))
        self.mixed_blocks = min(global_batch_size, max_blocks, blocks)
        self.mixed_bytes = self.mixed_blocks * size_bytes // max(1, blocks)
        self._newest: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, manifest: Manifest, global_batch_size: int, seed: int) -> "Order":
        """The order of a split, in blocks unless the split is small."""
        if manifest.is_small:
            return cls(len(manifest), global_batch_size, seed)
        size_bytes = int(manifest.length.sum())
        return cls(len(manifest), global_batch_size, seed, manifest.block_edges(), size_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None}  # another process computes it again

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch; the permutation's remainder is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left out of an epoch (different ones each time) so that every batch is full."""
        return self.num_samples % self.global_batch_size

    def epoch(self, epoch: int) -> np.ndarray:
        """Ids of an epoch, [steps_per_epoch, global_batch_size] int64, read-only."""
        if self._newest is None or self._newest[0] != epoch:
            full = self.steps_per_epoch * self.global_batch_size
            if self.block_edges is None:
                ids = permutation(self.num_samples, self.seed, epoch)[:full]
                batches = ids.reshape(self.steps_per_epoch, self.global_batch_size)
            else:
                batches = self._in_blocks(epoch, self.block_edges)
            batches.flags.writeable = False
            self._newest = epoch, batches
        return self._newest[1]

    def _in_blocks(self, epoch: int, edges: np.ndarray) -> np.ndarray:
        blocks = permutation(len(edges) - 1, self.seed, epoch)
        sizes = np.diff(edges)[blocks]
        starts = np.cumsum(sizes) - sizes
        block = np.repeat(np.arange(len(blocks)), sizes)  # [num_samples], in shuffled order
        words = _words(self.num_samples, self.seed, epoch, stream=1)
        # A random order within each block, and the blocks one after the other.
        shuffled = np.lexsort((words, block))
        line = (edges[blocks] - starts)[block] + shuffled

        width = segment_width(self.global_batch_size)
        segments, steps = self.global_batch_size // width, self.steps_per_epoch
        # A block's samples are evenly spaced, with a random offset.
        offset = _words(len(blocks), self.seed, epoch, stream=2) / 2.0**64
        within = (np.arange(self.num_samples) - starts[block] + offset[block]) / sizes[block]
        spread = self.mixed_blocks / segments * self.num_samples / len(blocks)
        key = starts[block] + within * spread
        full = segments * steps * width
        in_segment = np.argsort(key[:full].reshape(segments, -1), axis=1, kind="stable")
        ids = np.take_along_axis(line[:full].reshape(segments, -1), in_segment, axis=1)
        batches = ids.reshape(segments, steps, width).transpose(1, 0, 2)
        return np.ascontiguousarray(batches).reshape(steps, self.global_batch_size)


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

    def epoch(self, epoch: int) -> np.ndarray:
        """Ids of an epoch, [len(self), batch_size] int64."""
        mine = share(self.order.epoch(epoch), self.rank, self.world_size)
        pieces = [share(mine, part, self.parts) for part in range(self.parts)]
        return np.stack(pieces, axis=1).reshape(len(self), -1)


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
    def batch_size(self) -> int:
        """Rows of each batch."""
        return min(self.max_batch_size, self._per_rank)

    def __len__(self) -> int:
        return -(-self._per_rank // self.batch_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """Ids, [len(self), batch_size] int64, the same in every epoch."""
        first = self.rank * self._per_rank
        ids = first + np.arange(len(self) * self.batch_size)
        is_mine = ids < min(first + self._per_rank, self.num_samples)
        return np.where(is_mine, ids, NOT_COUNTED).reshape(len(self), self.batch_size)


@dataclass(frozen=True)
class ListedShare:
    """One rank's evaluation batches, listed.

    Attributes:
        batches: [K, B] int64 ids, NOT_COUNTED in padding.
    """

    batches: np.ndarray

    @property
    def batch_size(self) -> int:
        """Rows of each batch."""
        return self.batches.shape[1]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> np.ndarray:
        """Ids, [len(self), batch_size] int64, the same in every epoch."""
        return self.batches


def segment_width(global_batch_size: int) -> int:
    """Samples of each segment in a global batch: its smallest divisor of at least 8."""
    widths = range(_MIN_SEGMENT_SAMPLES, global_batch_size)
    return next((w for w in widths if global_batch_size % w == 0), global_batch_size)


def share(global_ids: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Contiguous slice `part` of `parts` equal ones of the last axis of `global_ids`."""
    width, rest = divmod(global_ids.shape[-1], parts)
    assert not rest, "TrainShare refuses what does not divide"
    return global_ids[..., part * width : (part + 1) * width]


@functools.lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(num_samples), [num_samples] int64, read-only.

    Sorts raw Philox words, whose values NumPy guarantees, and not `Generator.permutation`, whose
    stream may change between NumPy versions: a run must be resumable after an upgrade.
    """
    ids = np.argsort(_words(num_samples, seed, epoch), kind="stable")
    ids.flags.writeable = False
    return ids


def _words(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """[count] uint64 random bits, different for each stream."""
    key = np.array([seed + (stream << 32), epoch], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)
