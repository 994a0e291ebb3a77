"""The order of samples: pure, complete, and the same for every world size."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.order import Order, TrainShare, permutation, share
from lightship.errors import ConfigError

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
    whole = Order(100, 24, seed).epoch(epoch)[2]
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


# Sets that are read in blocks


def in_blocks(num_samples: int, per_block: int, batch_size: int, seed: int = 0) -> Order:
    edges = np.append(np.arange(0, num_samples, per_block), num_samples)
    return Order(num_samples, batch_size, seed, edges, (len(edges) - 1) * 2**22)


@given(st.data(), sizes, st.integers(1, 50), seeds, epochs)
def test_blocks_repeat_nothing_either(data, num_samples, per_block, seed, epoch) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    ids = in_blocks(num_samples, per_block, batch_size, seed).epoch(epoch)
    assert ids.shape == (num_samples // batch_size, batch_size)
    assert len(set(ids.ravel().tolist())) == ids.size
    assert 0 <= ids.min() <= ids.max() < num_samples


def test_what_is_dropped_is_another_part_in_every_epoch() -> None:
    order = in_blocks(1000, 10, 64)
    dropped = [set(range(1000)) - set(order.epoch(epoch).ravel().tolist()) for epoch in range(9)]
    assert {len(ids) for ids in dropped} == {order.dropped_per_epoch}
    assert len(set.union(*dropped)) > 3 * order.dropped_per_epoch


def entropy(labels: np.ndarray, classes: int) -> float:
    """Mean over batches ([batches, B]) of the entropy of a batch's classes, in bits."""
    counts = np.stack([np.bincount(batch, minlength=classes) for batch in labels])
    share = counts / counts.sum(1, keepdims=True)
    return float(-(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(1).mean())


@pytest.mark.parametrize(
    ("num_samples", "classes", "per_block", "batch_size"),
    [(1_281_167, 1000, 37, 256), (1_281_167, 1000, 37, 1024), (50_000, 10, 37, 512),
     (100_000, 100, 8, 128), (100_000, 1000, 100, 256)],
)  # fmt: skip
def test_shuffle_of_sorted_classes_is_as_good_as_a_permutation(
    num_samples: int, classes: int, per_block: int, batch_size: int, capsys
) -> None:
    """ImageNet's size and others, sorted by class: the mean entropy of a batch's classes."""
    labels = np.arange(num_samples) * classes // num_samples
    order = in_blocks(num_samples, per_block, batch_size)
    some = np.linspace(0, order.steps_per_epoch - 1, 500).astype(int)
    ours = entropy(labels[order.epoch(0)[some]], classes)
    best = entropy(labels[Order(num_samples, batch_size, 0).epoch(0)[some]], classes)
    with capsys.disabled():
        print(
            f"\n  {num_samples} in blocks of {per_block}, {batch_size} a batch: {ours / best:.4f}"
        )
    assert ours >= 0.98 * best


def test_reading_ahead_holds_no_more_blocks_than_are_mixed() -> None:
    """Blocks begun and not finished, batch by batch, and how few the first batch needs."""
    order = in_blocks(100_000, 37, 128)
    block = order.epoch(0) // 37
    first, last = np.full(2703, len(block)), np.zeros(2703, dtype=int)
    for step, blocks in enumerate(block):
        first[blocks] = np.minimum(first[blocks], step)
        last[blocks] = np.maximum(last[blocks], step)
    held = [((first <= step) & (last >= step)).sum() for step in range(len(block))]
    assert max(held) <= 1.15 * order.mixed_blocks
    assert len(set(block[0].tolist())) < 40


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_a_block_is_one_ranks(world_size: int) -> None:
    """But for the few that are cut where a rank's lanes end."""
    order = in_blocks(20_000, 37, 128)
    owners: dict[int, set[int]] = {}
    for rank in range(world_size):
        for block in np.unique(TrainShare(order, rank, world_size, 1).epoch(0) // 37).tolist():
            owners.setdefault(block, set()).add(rank)
    assert sum(len(ranks) > 1 for ranks in owners.values()) < world_size


def test_order_in_blocks_is_fixed_for_good() -> None:
    ids = in_blocks(20, 4, 5, seed=1).epoch(2).tolist()
    assert ids == [
        [17, 10, 16, 3, 8],
        [19, 6, 2, 9, 18],
        [4, 1, 14, 11, 7],
        [0, 13, 5, 12, 15],
    ]


def test_batch_larger_than_split_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is 64.*only 50 images"):
        Order(50, 64, 0)


def test_indivisible_batch_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 10 is not divisible by 3"):
        TrainShare(Order(50, 10, 0), rank=0, world_size=3, parts=1)
