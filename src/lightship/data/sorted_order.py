"""Version 1 of the order of samples, which runs that began with it go on with.

It sorts the whole epoch: O(N log N) time and O(N) memory in each process.
"""

import functools
from typing import Any

import numpy as np

from lightship.data.blocks import Blocks
from lightship.data.order import Order, segment_width
from lightship.data.permutation import words

_MIX_BYTES = 4 * 2**30


class SortedOrder(Order):
    """A set that is shuffled as a whole or, given `block_edges`, in blocks.

    The blocks come in random order, cut into segments of equal length; every global batch takes
    equally many samples of each segment, and within a segment each block is spread evenly, with a
    random offset, over as many batches as let every sample of a batch come from a different block.

    Args:
        num_samples: Size of the training split.
        global_batch_size: Samples per optimizer step over all ranks.
        seed: The run's seed.
        block_edges: [K + 1] int64, from 0 to num_samples: sample i is in block k if
            edges[k] <= i < edges[k + 1] (`Manifest.block_edges`). None: no blocks.
        size_bytes: Size of the whole set; at most 4 GiB of blocks are mixed. Only for blocks.

    Attributes:
        mixed_blocks: Blocks that are spread over the same batches.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        block_edges: np.ndarray | None = None,
        size_bytes: int = 0,
    ) -> None:
        super().__init__(num_samples, global_batch_size, seed)
        self.block_edges = block_edges
        blocks = 0
        if block_edges is not None:
            blocks = len(block_edges) - 1
            self.blocks = Blocks(block_edges, int(np.diff(block_edges).max()))
        max_blocks = max(1, int(_MIX_BYTES / max(1.0, size_bytes / max(1, blocks))))
        self.mixed_blocks = min(global_batch_size, max_blocks, blocks)
        self.mixed_bytes = self.mixed_blocks * size_bytes // max(1, blocks)
        self._newest: tuple[int, np.ndarray] | None = None
        self._newest_places: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process computes the epoch again."""
        return {**self.__dict__, "_newest": None, "_newest_places": None}

    def ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """See `Order`."""
        return self.epoch(epoch).ravel()[places]

    def places(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """See `Order`."""
        if self._newest_places is None or self._newest_places[0] != epoch:
            line = self.epoch(epoch).ravel()
            places = np.full(self.num_samples, -1, dtype=np.int64)
            places[line] = np.arange(len(line))
            self._newest_places = epoch, places
        return self._newest_places[1][ids]

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
        random = words(self.num_samples, self.seed, epoch, stream=1)
        # A random order within each block, and the blocks one after the other.
        shuffled = np.lexsort((random, block))
        line = (edges[blocks] - starts)[block] + shuffled

        width = segment_width(self.global_batch_size, self.global_batch_size)
        segments, steps = self.global_batch_size // width, self.steps_per_epoch
        # A block's samples are evenly spaced, with a random offset.
        offset = words(len(blocks), self.seed, epoch, stream=2) / 2.0**64
        within = (np.arange(self.num_samples) - starts[block] + offset[block]) / sizes[block]
        spread = self.mixed_blocks / segments * self.num_samples / len(blocks)
        key = starts[block] + within * spread
        full = segments * steps * width
        in_segment = np.argsort(key[:full].reshape(segments, -1), axis=1, kind="stable")
        ids = np.take_along_axis(line[:full].reshape(segments, -1), in_segment, axis=1)
        batches = ids.reshape(segments, steps, width).transpose(1, 0, 2)
        return np.ascontiguousarray(batches).reshape(steps, self.global_batch_size)


@functools.lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(num_samples), [num_samples] int64, read-only."""
    ids = np.argsort(words(num_samples, seed, epoch), kind="stable")
    ids.flags.writeable = False
    return ids
