"""The order of samples: pure, complete, and the same for every world size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.data.blocks import Blocks
from lightship.data.order import BlockShuffle, Order, Shuffle
from lightship.data.shares import EvalShare, ListedShare, TrainShare
from lightship.errors import ConfigError

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 10_000)


def whole(order: Order, epoch: int) -> np.ndarray:
    """The ids of an epoch, [steps, B]."""
    shape = order.steps_per_epoch, order.global_batch_size
    return order.ids(epoch, np.arange(shape[0] * shape[1])).reshape(shape)


def in_blocks(num_samples: int, per_block: int, batch_size: int, seed: int = 0) -> BlockShuffle:
    size_bytes = num_samples * 2**22 // per_block
    blocks = Blocks(np.array([0, num_samples]), per_block)
    return BlockShuffle(blocks, batch_size, seed, size_bytes)


def check_epoch(order: Order, epoch: int) -> None:
    """Full batches, no sample twice, the inverse, and any batch alone."""
    ids = whole(order, epoch)
    assert len(set(ids.ravel().tolist())) == ids.size
    assert 0 <= ids.min() <= ids.max() < order.num_samples
    places = order.places(epoch, np.arange(order.num_samples))
    assert places[ids.ravel()].tolist() == list(range(ids.size))
    assert (places < 0).sum() == order.dropped_per_epoch == order.num_samples - ids.size
    one, size = order.steps_per_epoch // 2, order.global_batch_size
    assert order.ids(epoch, one * size + np.arange(size)).tolist() == ids[one].tolist()


@given(st.data(), sizes, seeds, epochs)
def test_shuffled_as_a_whole(data, num_samples: int, seed: int, epoch: int) -> None:
    check_epoch(Shuffle(num_samples, data.draw(st.integers(1, num_samples)), seed), epoch)


@settings(deadline=None)
@given(
    st.data(), st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 60),
    seeds, epochs, st.integers(1, 2**45),
)  # fmt: skip
def test_shuffled_in_blocks(data, groups, size, seed, epoch, size_bytes) -> None:
    blocks = Blocks(np.cumsum([0, *groups]), size)
    batch_size = data.draw(st.integers(1, blocks.num_samples))
    check_epoch(BlockShuffle(blocks, batch_size, seed, size_bytes), epoch)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 60))
def test_blocks_hold_every_sample_once(groups: list[int], size: int) -> None:
    blocks = Blocks(np.cumsum([0, *groups]), size)
    ids = np.arange(sum(groups))
    block, place = blocks.where(ids)
    assert blocks.samples(block, place).tolist() == ids.tolist()
    assert (place < size).all()
    assert (block == blocks.count).sum() == blocks.tail < size
    for i in ids.tolist():
        first, end = blocks.around(i)
        assert first <= i < end <= first + size
        assert len({int(np.searchsorted(blocks.edges, j, "right")) for j in (first, end - 1)}) == 1


def test_epochs_and_seeds_differ() -> None:
    for make in (lambda seed: Shuffle(50, 7, seed), lambda seed: in_blocks(50, 4, 7, seed)):
        orders = {tuple(whole(make(s), e).ravel()) for s in range(4) for e in range(4)}
        assert len(orders) == 16


def test_order_is_fixed_for_good() -> None:
    """A run must be resumable by a later version: these numbers may never change."""
    assert whole(Shuffle(20, 6, 1), 2).tolist() == [
        [16, 1, 10, 9, 8, 3],
        [7, 17, 4, 13, 19, 12],
        [6, 14, 5, 18, 15, 11],
    ]
    assert whole(in_blocks(20, 4, 5, seed=1), 2).tolist() == [
        [11, 1, 10, 6, 3],
        [8, 12, 5, 2, 16],
        [9, 13, 7, 0, 17],
        [14, 4, 18, 15, 19],
    ]


@pytest.mark.parametrize("order", [in_blocks(1000, 10, 64), Shuffle(1000, 64, 0)])
def test_what_is_dropped_is_another_part_in_every_epoch(order: Order) -> None:
    dropped = [set(np.flatnonzero(order.places(epoch, np.arange(1000)) < 0)) for epoch in range(9)]
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
     (100_000, 100, 8, 128), (100_000, 1000, 100, 256), (10**8, 1000, 37, 1024)],
)  # fmt: skip
def test_shuffle_of_sorted_classes_is_as_good_as_a_permutation(
    num_samples: int, classes: int, per_block: int, batch_size: int
) -> None:
    """ImageNet's size and others, sorted by class: the mean entropy of a batch's classes."""
    order = in_blocks(num_samples, per_block, batch_size)
    some = np.linspace(0, order.steps_per_epoch - 1, 200).astype(int)
    places = (some[:, None] * batch_size + np.arange(batch_size)).ravel()

    def measured(order: Order) -> float:
        labels = order.ids(0, places) * classes // num_samples
        return entropy(labels.reshape(-1, batch_size), classes)

    best = measured(Shuffle(num_samples, batch_size, 0))
    by_chance = np.random.default_rng(0).integers(0, classes, (len(some), batch_size))
    assert best >= 0.995 * entropy(by_chance, classes)
    assert measured(order) >= 0.99 * best


def test_reading_ahead_holds_no_more_blocks_than_are_mixed() -> None:
    """Blocks begun and not finished, batch by batch, and how few the first batch needs."""
    order = in_blocks(100_000, 37, 128)
    block = whole(order, 0) // 37
    first, last = np.full(2703, len(block)), np.zeros(2703, dtype=int)
    for step, blocks in enumerate(block):
        first[blocks] = np.minimum(first[blocks], step)
        last[blocks] = np.maximum(last[blocks], step)
    held = [((first <= step) & (last >= step)).sum() for step in range(len(block))]
    begun = np.bincount(first, minlength=len(block) + 1)[20:700]
    assert max(held) <= 1.25 * order.mixed_blocks
    assert len(set(block[0].tolist())) < 40
    assert begun.max() <= 8, "16 lanes begin their blocks in turn"


def test_mixed_bytes_are_bounded() -> None:
    """Row groups of 200 MB: 20 of them are 4 GB."""
    blocks = Blocks(np.arange(0, 10**6 + 1, 1000), 1000)
    order = BlockShuffle(blocks, 1024, 0, 200 * 10**9)
    assert order.mixed_bytes <= 4 * 2**30
    assert len(np.unique(order.ids(0, 300 * 1024 + np.arange(1024)) // 1000)) <= 2 * 21


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_a_block_is_one_ranks(world_size: int) -> None:
    """But for a few, in which the lanes of several ranks have a piece."""
    order = in_blocks(20_000, 37, 128)
    owners: dict[int, set[int]] = {}
    for rank in range(world_size):
        share = TrainShare(order, rank, world_size, 1)
        for block in np.unique(share.batches(0, 0, len(share)) // 37).tolist():
            owners.setdefault(block, set()).add(rank)
    assert sum(len(ranks) > 1 for ranks in owners.values()) <= world_size


@pytest.mark.parametrize("order", [Shuffle(1000, 48, 3), in_blocks(1000, 10, 48, 3)])
@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (3, 2), (4, 3), (48, 1)])
def test_shares_of_all_ranks_are_the_global_batch(
    order: Order, world_size: int, parts: int
) -> None:
    ids = whole(order, 5)
    shares = [TrainShare(order, rank, world_size, parts) for rank in range(world_size)]
    batches = [share.batches(5, 0, len(share)) for share in shares]
    by_step = [each.reshape(order.steps_per_epoch, -1) for each in batches]
    assert np.concatenate(by_step, axis=1).tolist() == ids.tolist()
    everything = np.arange(1000)
    for share, each in zip(shares, batches, strict=True):
        assert share.batches(5, 3, 5).tolist() == each[3:5].tolist()
        expected = np.full(1000, -1)
        expected[each] = np.arange(len(share))[:, None]
        assert share.batches_of(5, everything).tolist() == expected.tolist()


@pytest.mark.parametrize("share", [
    *(EvalShare(50, 8, rank, 3) for rank in range(3)),
    ListedShare(np.array([[5, 3], [9, -1]])), ListedShare(np.zeros((0, 4), dtype=np.int64)),
])  # fmt: skip
def test_where_a_sample_is_evaluated(share: EvalShare | ListedShare) -> None:
    batches, expected = share.batches(0, 0, len(share)), np.full(50, -1)
    for number, ids in enumerate(batches):
        expected[ids[ids >= 0]] = number
    assert share.batches_of(0, np.arange(50)).tolist() == expected.tolist()


@pytest.mark.parametrize("num_samples", [10**6, 10**8, 10**9])
@pytest.mark.parametrize("world_size", [1, 1024])
def test_a_batch_takes_memory_of_a_batch(num_samples: int, world_size: int) -> None:
    """First batch, another and another epoch's, and a block's places: counted, at any size."""
    tracemalloc.start()
    try:
        order = in_blocks(num_samples, 37, 1024)
        share = TrainShare(order, world_size - 1, world_size, 1)
        for epoch, batch in ((0, 0), (0, len(share) // 2), (1, len(share) - 1)):
            ids = share.batches(epoch, batch, batch + 1)[0]
            assert (share.batches_of(epoch, ids) == batch).all()
            share.batches_of(epoch, np.arange(*order.blocks.around(int(ids[0]))))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20


def test_batch_larger_than_split_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is 64.*only 50 images"):
        Shuffle(50, 64, 0)


def test_indivisible_batch_names_both() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 10 is not divisible by 3"):
        TrainShare(Shuffle(50, 10, 0), rank=0, world_size=3, parts=1)
