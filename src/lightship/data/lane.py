"""A lane: how the blocks that follow each other in one part of a batch are interleaved."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np


class Lane:
    """The course of a lane: which sample of which of its blocks comes at each position.

    A lane is `count` blocks of `size` samples and a last one of `rest`. Block n begins at time n,
    in units of a block, and its samples are evenly spaced over the `spread` units that follow, so
    that as many blocks are interleaved at any time: a convolutional interleaver (Forney, "Burst-
    Correcting Codes for the Classic Bursty Channel", 1971). Between the first and the last blocks
    each unit of time is like the others, which gives any position without those before it.

    Args:
        size: Samples a block.
        count: Blocks of that size.
        rest: Samples of the last block, less than `size`.
        spread: Blocks that are interleaved.
    """

    def __init__(self, size: int, count: int, rest: int, spread: Fraction) -> None:
        self.size, self.count, self.rest, self.spread = size, count, rest, spread
        self._unit, key = self._times(size)
        self._last_unit, self._last_key = self._times(rest)
        self._order = np.argsort(key, kind="stable")  # of a steady unit
        self._key, self._rank = key, np.argsort(self._order)
        units = math.floor(spread) + 1  # in which a block's samples come
        self._steady_from, self._steady_to = min(units, count), count
        before = range(self._steady_from)
        after = range(self._steady_to, count + units)
        self._up = _running(self._size_of(unit) for unit in before)
        self._down = _running(self._size_of(unit) for unit in after)
        self._steady_start = int(self._up[-1])
        steady = self._steady_to - self._steady_from
        self._down_start = self._steady_start + steady * size

    def _times(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """When a block's samples come: (units after its beginning, what part of a unit)."""
        numerator = self.spread.numerator * (2 * np.arange(size) + 1)
        return np.divmod(numerator, max(1, 2 * size * self.spread.denominator))

    def _size_of(self, unit: int) -> int:
        return len(self._of_unit(unit)[0])

    def _of_unit(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """(block, place in it) of the samples of any unit, in the order in which they come."""
        block = unit - self._unit
        chosen = np.flatnonzero((block >= 0) & (block < self.count))
        last = np.flatnonzero(self._last_unit == unit - self.count)
        blocks = np.concatenate([block[chosen], np.full(len(last), self.count)])
        places = np.concatenate([chosen, last])
        # Fractions of a unit, brought to one denominator.
        times = np.concatenate(
            [self._key[chosen] * max(1, self.rest), self._last_key[last] * self.size]
        )
        order = np.argsort(times, kind="stable")
        return blocks[order], places[order]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, place in it) at positions ([M] int64) of the lane, [M] int64 each."""
        steady = positions - self._steady_start
        unit, x = np.divmod(steady, self.size)
        place = self._order[x]
        block = unit + self._steady_from - self._unit[place]
        edges = ((positions < self._steady_start) | (positions >= self._down_start)).nonzero()[0]
        if not len(edges):
            return block, place
        for unit_number, start, chosen in self._units_of(positions[edges]):
            blocks, places = self._of_unit(unit_number)
            rows = edges[chosen]
            block[rows] = blocks[positions[rows] - start]
            place[rows] = places[positions[rows] - start]
        return block, place

    def _units_of(self, positions: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(unit, its first position, which of `positions` lie in it), of those not steady."""
        is_up = positions < self._steady_start
        up = np.searchsorted(self._up, positions, side="right") - 1
        down = np.searchsorted(self._down, positions - self._down_start, side="right") - 1
        units = np.where(is_up, up, self._steady_to + down)
        for unit in np.unique(units).tolist():
            yield unit, self._start_of(unit), np.flatnonzero(units == unit)

    def _start_of(self, unit: int) -> int:
        if unit < self._steady_from:
            return int(self._up[unit])
        return self._down_start + int(self._down[unit - self._steady_to])

    def positions(self, block: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The inverse of `at`, [M] int64."""
        is_last = block == self.count
        after = self._unit[np.where(is_last, 0, place)]
        if is_last.any():
            after[is_last] = self._last_unit[place[is_last]]
        unit = block + after
        found = (
            self._steady_start
            + (unit - self._steady_from) * self.size
            + self._rank[np.where(is_last, 0, place)]
        )
        edges = np.flatnonzero((unit < self._steady_from) | (unit >= self._steady_to))
        for number in np.unique(unit[edges]).tolist():
            rows = edges[unit[edges] == number]
            blocks, places = self._of_unit(number)
            rank = np.empty((2, self.size), dtype=np.int64)
            rank[(blocks == self.count).astype(np.int64), places] = np.arange(len(blocks))
            found[rows] = self._start_of(number) + rank[is_last[rows].astype(np.int64), place[rows]]
        return found


def _running(counts: Iterator[int]) -> np.ndarray:
    """Sums of what comes before each, and of all: [K + 1] int64."""
    return np.cumsum([0, *counts], dtype=np.int64)
