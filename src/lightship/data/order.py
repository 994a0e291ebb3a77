"""Which samples make up which global batch: a pure function of (seed, epoch, set, batch size).

Nothing here depends on ranks, workers or storage. A rank takes its slice of a global batch, so the
same samples share a step on any number of processes, and the whole state of the input pipeline is
the number of steps done. Any batch of any epoch is computed alone, in time and memory of a batch.
"""

import functools
from abc import ABC, abstractmethod
from fractions import Fraction

import numpy as np

from lightship.data.blocks import Blocks
from lightship.data.lane import Lane
from lightship.data.permutation import Permutation, words
from lightship.errors import ConfigError

_MIN_SEGMENT_SAMPLES = 8
_MIX_BYTES = 4 * 2**30
_PHASES = 16
_SHUFFLE, _BLOCKS, _WITHIN, _REST, _ROTATION = range(16, 21)
"""Streams of random numbers of an epoch; version 1 has 0 to 2."""


class Order(ABC):
    """The sample ids of every global training batch.

    Args:
        num_samples: Size of the training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.

    Attributes:
        blocks: The blocks that are read together; None: the set is shuffled as a whole.
        mixed_bytes: Size of the blocks that are spread over the same batches.

    Raises:
        ConfigError: The batch is larger than the split.
    """

    blocks: Blocks | None = None
    mixed_bytes = 0

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
        """Full global batches in an epoch; the remainder is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Samples left out of an epoch (different ones each time) so that every batch is full."""
        return self.num_samples % self.global_batch_size

    @abstractmethod
    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples at places of an epoch, [M] int64.

        Args:
            epoch: 0, 1, ...
            places: [M] int64: batch * global_batch_size + row.
        """

    @abstractmethod
    def places(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """The inverse of `ids`, [M] int64; -1 where a sample is dropped in this epoch."""


class Shuffle(Order):
    """A set that is shuffled as a whole."""

    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """See `Order`."""
        return self._permutation(epoch)(places)

    def places(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """See `Order`."""
        found = self._permutation(epoch).inverse(ids)
        return np.where(found < self.steps_per_epoch * self.global_batch_size, found, -1)

    def _permutation(self, epoch: int) -> Permutation:
        return _permutation(self.num_samples, self.seed, epoch, _SHUFFLE)


class BlockShuffle(Order):
    """A set that is shuffled so that it can be read in blocks of neighbouring samples.

    A global batch has segments of equal width (so a rank whose share is whole segments reads each
    block alone), and each segment its lane of blocks over the epoch. Blocks come in random order,
    the samples of each in random order too. A lane interleaves its blocks so that the samples of a
    segment come from as many blocks as are mixed (see `Lane`). What whole blocks cannot fill of a
    lane is a piece of less than a block, of those that are left.

    Args:
        blocks: Of the training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.
        size_bytes: Size of the whole set; at most 4 GiB of blocks are mixed.

    Attributes:
        width: Samples of a segment.
        mixed_blocks: Blocks that are spread over the same batches.
    """

    def __init__(self, blocks: Blocks, global_batch_size: int, seed: int, size_bytes: int) -> None:
        super().__init__(blocks.num_samples, global_batch_size, seed)
        self.blocks: Blocks = blocks
        block_bytes = max(1.0, size_bytes * blocks.size / self.num_samples)
        max_mixed = max(1, int(_MIX_BYTES / block_bytes))
        self.width = segment_width(global_batch_size, max_mixed)
        self._lanes = global_batch_size // self.width
        self._lane_samples = self.steps_per_epoch * self.width
        self._lane_blocks, self._rest = divmod(self._lane_samples, blocks.size)
        enough = min(self.width + Fraction(1, 2), Fraction(self._lane_blocks + 1))
        self._spread = max(Fraction(1), min(Fraction(max_mixed, self._lanes), enough))
        self._phases = min(_PHASES, self._lanes)
        self.mixed_blocks = int(self._spread * self._lanes)
        self.mixed_bytes = min(size_bytes, int(self.mixed_blocks * block_bytes))

    def _lane(self, phase: int) -> Lane:
        """The course of the lanes of a phase.

        A lane that spreads its blocks over more begins each of them earlier: by half a block for
        one more. So that the lanes do not all begin theirs at once, the spreads differ by up to 1.
        """
        around = Fraction(2 * phase + 1, 2 * self._phases) - Fraction(1, 2)
        return _lane(self.blocks.size, self._lane_blocks, self._rest, self._spread + around)

    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """See `Order`."""
        batch, row = np.divmod(places, self.global_batch_size)
        lane, within = np.divmod(row, self.width)
        position = batch * self.width + within
        # All lanes of a phase are alike: what few positions they have is computed once.
        some, back = np.unique(position, return_inverse=True)
        phases, of_phase = np.unique(lane % self._phases, return_inverse=True)
        found = np.array([self._lane(phase).at(some) for phase in phases.tolist()])
        number, place = found[of_phase, 0, back], found[of_phase, 1, back]
        return self._samples(epoch, lane, number, place)

    def _samples(
        self, epoch: int, lane: np.ndarray, number: np.ndarray, place: np.ndarray
    ) -> np.ndarray:
        """The samples at places of blocks of lanes, [M] int64 each."""
        blocks, size = self.blocks, self.blocks.size
        in_rest = np.flatnonzero(number == self._lane_blocks)
        block = lane * self._lane_blocks + number
        within = place.copy()
        if len(in_rest):
            piece = lane[in_rest]
            inner = self._permutation(self._rest, epoch, _REST)(place[in_rest], piece)
            left = (piece * self._rest + inner + self._rotation(epoch)) % self._left
            block[in_rest] = self._lanes * self._lane_blocks + left // size
            within[in_rest] = left % size
        chosen = np.flatnonzero(block < blocks.count)
        if len(chosen):
            block[chosen] = self._permutation(blocks.count, epoch, _BLOCKS)(block[chosen])
        whole = np.flatnonzero(number < self._lane_blocks)
        if len(whole):
            inner = self._permutation(size, epoch, _WITHIN)(place[whole], block[whole])
            within[whole] = inner
        return blocks.samples(block, within)

    @property
    def _left(self) -> int:
        """Samples of the blocks that no lane has whole, and of the tail."""
        return self.num_samples - self._lanes * self._lane_blocks * self.blocks.size

    def _rotation(self, epoch: int) -> int:
        """Where the first lane's piece of what is left begins: others are dropped each epoch."""
        return int(words(1, self.seed, epoch, _ROTATION)[0] % np.uint64(self._left))

    def places(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """See `Order`."""
        blocks, size = self.blocks, self.blocks.size
        block, within = blocks.where(ids)
        drawn = block.copy()
        chosen = np.flatnonzero(block < blocks.count)
        if len(chosen):
            drawn[chosen] = self._permutation(blocks.count, epoch, _BLOCKS).inverse(block[chosen])
        lane, number = np.divmod(drawn, max(1, self._lane_blocks))
        is_whole = drawn < self._lanes * self._lane_blocks
        place = within.copy()
        whole = np.flatnonzero(is_whole)
        if len(whole):
            inner = self._permutation(size, epoch, _WITHIN).inverse(within[whole], block[whole])
            place[whole] = inner
        dropped = np.zeros(len(ids), dtype=bool)
        rest = np.flatnonzero(~is_whole)
        if len(rest):
            left = (drawn[rest] - self._lanes * self._lane_blocks) * size + within[rest]
            left = (left - self._rotation(epoch)) % self._left
            piece, inner = np.divmod(left, max(1, self._rest))
            dropped[rest] = left >= self._lanes * self._rest
            kept = np.flatnonzero(~dropped[rest])
            if len(kept):
                permutation = self._permutation(self._rest, epoch, _REST)
                inner[kept] = permutation.inverse(inner[kept], piece[kept])
            lane[rest], number[rest], place[rest] = piece, self._lane_blocks, inner
        return np.where(dropped, -1, self._of_lanes(lane, number, place, dropped))

    def _of_lanes(
        self, lane: np.ndarray, number: np.ndarray, place: np.ndarray, dropped: np.ndarray
    ) -> np.ndarray:
        """Places in the epoch of places in blocks of lanes, [M] int64."""
        position = np.zeros_like(place)
        phase = np.where(dropped, -1, lane % self._phases)
        for each in np.unique(phase[~dropped]).tolist():
            rows = np.flatnonzero(phase == each)
            position[rows] = self._lane(each).positions(number[rows], place[rows])
        batch, within = np.divmod(position, self.width)
        return batch * self.global_batch_size + lane * self.width + within

    def _permutation(self, size: int, epoch: int, stream: int) -> Permutation:
        return _permutation(size, self.seed, epoch, stream)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, epoch: int, stream: int) -> Permutation:
    return Permutation(size, seed, epoch, stream)


@functools.lru_cache(maxsize=4 * _PHASES)
def _lane(size: int, count: int, rest: int, spread: Fraction) -> Lane:
    return Lane(size, count, rest, spread)


def segment_width(global_batch_size: int, max_segments: int) -> int:
    """Samples of each segment in a global batch: its smallest divisor of at least 8.

    Args:
        global_batch_size: To divide.
        max_segments: How many segments there may be.
    """
    least = max(_MIN_SEGMENT_SAMPLES, -(-global_batch_size // max_segments))
    widths = range(least, global_batch_size)
    return next((w for w in widths if global_batch_size % w == 0), global_batch_size)
