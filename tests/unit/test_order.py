"""The order of samples: pure, complete, and the same for every world size."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.order import Order, permutation, share
from lightship.exits import ConfigError

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 10_000)


@given(sizes, seeds, epochs)
def test_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(num_samples, seed, epoch).tolist()) == list(range(num_samples))


@given(st.data(), sizes, seeds, epochs)
def test_batches_are_full_and_repeat_nothing(data, num_samples: int, seed: int, epoch: int) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    order = Order(num_samples, batch_size, seed)
    ids = order.epoch(epoch)
    assert ids.shape == (num_samples // batch_size, batch_size)
    assert len(set(ids.ravel().tolist())) == ids.size
    assert order.dropped_per_epoch == num_samples - ids.size


@given(seeds, epochs, st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_shares_of_all_ranks_are_the_global_batch(seed: int, epoch: int, world_size: int) -> None:
    whole = Order(100, 24, seed).batch(epoch, 2)
    parts = [share(whole, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_is_fixed_for_good() -> None:
    """A run must be resumable by a later version: these numbers may never change."""
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_order_is_the_same_in_another_process() -> None:
    code = "from lightship.data.order import permutation; print(permutation(9, 5, 2).tolist())"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(permutation(9, 5, 2).tolist())


def test_position_of_a_sample_is_uniform() -> None:
    """Sample 0 of 20 falls into each tenth of the epoch about equally often."""
    where = [int(np.flatnonzero(permutation(20, 1, epoch) == 0)[0]) // 2 for epoch in range(4000)]
    counts = np.bincount(where, minlength=10)
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_batch_larger_than_split_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is 64.*only 50 images"):
        Order(50, 64, 0)


def test_indivisible_batch_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 10 is not divisible by 3"):
        share(np.arange(10), 0, 3)
