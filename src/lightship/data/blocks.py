"""Blocks: runs of neighbouring samples that are read together."""

import numpy as np


class Blocks:
    """The samples of a split, in blocks that all have the same number of samples.

    A split is one group of neighbouring samples, or several (the row groups of Parquet), which a
    block does not cross. What is left at the end of each group makes blocks of its own, of
    neighbouring rests, and fewer samples than a block are left over in the end: the tail.

    Args:
        edges: [G + 1] int64, from 0 to N: group g holds the samples from edges[g] to edges[g + 1].
        size: Samples a block.

    Attributes:
        count: Number of blocks.
        tail: Number of samples in none.
    """

    def __init__(self, edges: np.ndarray, size: int) -> None:
        assert size > 0, size
        self.edges, self.size = edges, size
        groups = np.diff(edges)
        self._firsts = _running(groups // size)  # [G + 1] blocks before each group
        self._rests = _running(groups % size)  # [G + 1] samples of rests before each group
        self._whole = int(self._firsts[-1])
        self.count = self._whole + int(self._rests[-1]) // size
        self.tail = int(self._rests[-1]) % size

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return int(self.edges[-1])

    def samples(self, block: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The sample at each place of a block; block `count` is the tail. [M] int64 each."""
        group = np.searchsorted(self._firsts, block, side="right") - 1
        group = np.minimum(group, len(self.edges) - 2)
        first = self.edges[group]
        found = first + (block - self._firsts[group]) * self.size + place
        in_rest = np.flatnonzero(block >= self._whole)
        if len(in_rest):
            rest = (block[in_rest] - self._whole) * self.size + place[in_rest]
            group = np.searchsorted(self._rests, rest, side="right") - 1
            whole = (self._firsts[group + 1] - self._firsts[group]) * self.size
            found[in_rest] = self.edges[group] + whole + rest - self._rests[group]
        return found

    def where(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `samples`: (block, place) of samples, [M] int64 each."""
        group = np.searchsorted(self.edges, ids, side="right") - 1
        offset = ids - self.edges[group]
        whole = (self._firsts[group + 1] - self._firsts[group]) * self.size
        line = self._firsts[group] * self.size + offset
        in_rest = offset >= whole
        rest = self._whole * self.size + self._rests[group] + offset - whole
        block, place = np.divmod(np.where(in_rest, rest, line), self.size)
        return block, place

    def around(self, i: int) -> tuple[int, int]:
        """The neighbours of sample `i` that are read together with it: first, and end."""
        group = int(np.searchsorted(self.edges, i, side="right")) - 1
        first = int(self.edges[group])
        start = first + (i - first) // self.size * self.size
        return start, min(start + self.size, int(self.edges[group + 1]))


def _running(counts: np.ndarray) -> np.ndarray:
    """Sums of what comes before each, and of all: [G + 1] int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
