"""Keyed permutations: bijections, the same for good, and uniform."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.permutation import Permutation

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 10_000)


@given(sizes, seeds, epochs, st.booleans())
def test_every_element_once_and_back(size: int, seed: int, epoch: int, tweaked: bool) -> None:
    permutation, line = Permutation(size, seed, epoch, 16), np.arange(size)
    tweaks = np.full(size, 7) if tweaked else None
    there = permutation(line, tweaks)
    assert sorted(there.tolist()) == line.tolist()
    assert permutation.inverse(there, tweaks).tolist() == line.tolist()


@given(st.integers(2**20, 2**40), seeds)
def test_large_sizes_are_walked_back_into_range(size: int, seed: int) -> None:
    permutation = Permutation(size, seed, 0, 16)
    line = np.unique(np.linspace(0, size - 1, 1000).astype(np.int64))
    there = permutation(line)
    assert there.min() >= 0
    assert there.max() < size
    assert len(np.unique(there)) == len(line)
    assert permutation.inverse(there).tolist() == line.tolist()


def test_it_is_fixed_for_good() -> None:
    """A run must be resumable by a later version: these numbers may never change."""
    assert Permutation(10, 0, 0, 16)(np.arange(10)).tolist() == [2, 1, 8, 3, 0, 4, 9, 6, 7, 5]
    tweaked = Permutation(10, 7, 3, 18)(np.arange(10), np.full(10, 5))
    assert tweaked.tolist() == [4, 0, 1, 7, 2, 5, 6, 8, 9, 3]
    large = Permutation(10**9, 7, 3, 16)(np.arange(3))
    assert large.tolist() == [726437667, 741131181, 236236238]


def test_seeds_epochs_streams_and_tweaks_differ() -> None:
    line = np.arange(50)
    orders = {
        tuple(Permutation(50, seed, epoch, stream)(line, np.full(50, tweak)))
        for seed in range(3)
        for epoch in range(3)
        for stream in range(3)
        for tweak in range(3)
    }
    assert len(orders) == 81


def chi_square(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


def test_places_of_all_elements_are_uniform() -> None:
    """Which of 20 elements goes where, over 4,000 permutations."""
    line, tweaks = np.tile(np.arange(20), 4000), np.repeat(np.arange(4000), 20)
    there = Permutation(20, 1, 0, 16)(line, tweaks)
    counts = np.bincount(line * 20 + there, minlength=400)
    assert chi_square(counts) < 450  # 361 degrees of freedom, p = 0.001


def test_neighbours_are_independent() -> None:
    """Where two neighbours of a million fall, in a grid of 20 x 20, and how far apart."""
    there = Permutation(10**6, 3, 0, 16)(np.arange(10**6))
    cell = there // 50_000
    counts = np.bincount(cell[0::2] * 20 + cell[1::2], minlength=400)
    assert chi_square(counts) < 490  # 399 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(there[:-1], there[1:])[0, 1]) < 0.004
