"""Loaders of a resident split: every sample where it belongs, on any world size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.augment import Augment
from lightship.data.batch import NOT_COUNTED
from lightship.data.order import Shuffle
from lightship.data.resident import ResidentEvalLoader, ResidentSplit, ResidentTrainLoader
from lightship.data.shares import EvalShare, TrainShare
from lightship.errors import ConfigError


def split_of(count: int, bad: tuple[int, ...] = ()) -> ResidentSplit:
    images = (
        np.arange(count * 3 * 4 * 4).reshape(count, 3, 4, 4).astype(np.uint8).transpose(0, 2, 3, 1)
    )
    mask = np.isin(np.arange(count), bad)
    return ResidentSplit.from_arrays(images, np.arange(count) % 10, mask, torch.device("cpu"))


def train_batches(split, world_size, parts, positions, seed=0, batch_size=12):
    """Ids of the batches at `positions` as each rank's loader gives them: [rank][batch] lists."""
    order = Shuffle(len(split.labels), batch_size, seed)
    ranks = []
    for rank in range(world_size):
        place = iter(positions)
        share = TrainShare(order, rank, world_size, parts)
        loader = ResidentTrainLoader(split, share, Augment(seed), lambda place=place: next(place))
        batches = iter(loader)
        ranks.append([next(batches).ids.tolist() for _ in positions])
    return ranks


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_or_parts(world_size: int, parts: int) -> None:
    split, order = split_of(50), Shuffle(50, 12, 0)
    positions = [(epoch, index) for epoch in (0, 1) for index in range(4 * parts)]
    ranks = train_batches(split, world_size, parts, positions)
    for epoch in (0, 1):
        for step in range(4):
            first = (epoch * 4 + step) * parts
            together = [i for rank in ranks for part in rank[first : first + parts] for i in part]
            assert together == order.ids(epoch, np.arange(12) + 12 * step).tolist()


def test_resume_in_the_middle_repeats_and_skips_nothing() -> None:
    split = split_of(50)
    positions = [(epoch, index) for epoch in range(3) for index in range(4)]
    whole = train_batches(split, 1, 1, positions)[0]
    resumed = train_batches(split, 1, 1, positions[6:])[0]
    assert resumed == whole[6:]


def test_batches_hold_the_pixels_of_their_ids() -> None:
    split = split_of(50, bad=(7,))
    share = TrainShare(Shuffle(50, 50, 0), 0, 1, 1)
    loader = ResidentTrainLoader(split, share, Augment(0), lambda: (0, 0))
    batch = next(iter(loader))
    assert batch.images.shape == (50, 3, 4, 4)
    for image, label, sample in zip(batch.images, batch.labels, batch.ids, strict=True):
        expected = (np.arange(48) + int(sample) * 48).reshape(3, 4, 4).astype(np.uint8)
        assert image.tolist() == expected.tolist()
        assert int(label) == (NOT_COUNTED if sample == 7 else int(sample) % 10)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 5))
def test_evaluation_counts_every_sample_once(count: int, batch_size: int, world_size: int) -> None:
    split = split_of(count)
    seen, shapes, lengths = [], set(), set()
    for rank in range(world_size):
        loader = ResidentEvalLoader(split, EvalShare(count, batch_size, rank, world_size))
        batches = list(loader)
        lengths.add((len(loader), len(batches)))
        for batch in batches:
            shapes.add(batch.images.shape)
            counted = batch.ids[batch.labels != NOT_COUNTED]
            assert (batch.ids[batch.labels == NOT_COUNTED] == NOT_COUNTED).all()
            seen += counted.tolist()
    assert sorted(seen) == list(range(count))
    assert len(shapes) == 1
    assert len(lengths) == 1


def test_indivisible_batch_is_refused_when_the_share_is_made() -> None:
    with pytest.raises(ConfigError, match="12 is not divisible by 5"):
        TrainShare(Shuffle(50, 12, 0), rank=0, world_size=5, parts=1)
