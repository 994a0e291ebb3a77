"""What is held out for validation."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.data.held_out import hold_out, split_validation
from lightship.data.manifest import Manifest
from lightship.errors import DataError
from tests.unit.data.test_manifest import COLUMNS, assert_same, manifest_of


def held_out_by_0_1_0(manifest: Manifest, fraction: float) -> np.ndarray:
    """The rule as version 0.1.0 computed it, in 75 bytes a sample."""
    _, counts = np.unique(manifest.label, return_counts=True)
    room = counts - 1
    share = np.minimum(np.floor(counts * fraction).astype(np.int64), room)
    missing = min(max(1, round(len(manifest) * fraction)), int(room.sum())) - int(share.sum())
    by_remainder = np.argsort(share - counts * fraction, kind="stable")
    for c in by_remainder[share[by_remainder] < room[by_remainder]][: max(0, missing)]:
        share[c] += 1
    shuffled = np.random.RandomState(20_100_617).permutation(len(manifest))
    by_class = shuffled[np.argsort(manifest.label[shuffled], kind="stable")]
    rank_in_class = np.arange(len(manifest)) - np.repeat(np.cumsum(counts) - counts, counts)
    held_out = np.zeros(len(manifest), dtype=bool)
    held_out[by_class[rank_in_class < np.repeat(share, counts)]] = True
    return held_out


labels_strategy = st.lists(st.integers(0, 4), min_size=2, max_size=120)


@given(labels_strategy, st.floats(0.001, 0.9))
def test_validation_is_a_stratified_part_that_leaves_every_class_to_train(labels, fraction):
    table = manifest_of(labels)
    counts = np.bincount(table.label)
    if (counts <= 1).all():
        with pytest.raises(DataError, match=r"--data\.val_fraction"):
            split_validation(table, fraction)
        return
    train, val = split_validation(table, fraction)
    ids_train, ids_val = train.offset // 1000, val.offset // 1000
    assert sorted([*ids_train, *ids_val]) == list(range(len(labels)))
    assert (np.diff(ids_train) > 0).all()
    assert (np.diff(ids_val) > 0).all()
    assert len(val) >= 1
    held_out = np.bincount(val.label, minlength=len(counts))
    for count, held in zip(counts, held_out, strict=True):
        assert held <= max(0, count - 1)
        assert abs(held - count * fraction) <= 1
    np.testing.assert_array_equal(train.label, table.label[ids_train])
    again_train, again_val = split_validation(table, fraction)
    assert_same(again_train, train)
    assert_same(again_val, val)
    np.testing.assert_array_equal(hold_out(table, fraction), held_out_by_0_1_0(table, fraction))


def test_validation_is_not_the_first_of_each_class():
    _, val = split_validation(manifest_of([0] * 500 + [1] * 500), 0.1)
    assert len(val) == 100
    ids = val.offset // 1000
    assert 150 < ids[val.label == 0].mean() < 350
    assert ids[:10].tolist() == [2, 3, 8, 30, 33, 36, 43, 47, 69, 71]  # for ever the same


@pytest.mark.parametrize("fraction", [0.0001, 0.05, 0.5])
def test_runs_of_every_version_hold_out_the_same_in_a_few_bytes_a_sample(fraction: float) -> None:
    """Of many pieces; of classes of one sample to a third of all, and some without a label."""
    count = 10**6
    rng = np.random.default_rng(0)
    labels = (300 * rng.random(count) ** 4).astype(np.int16) - 1
    labels[:5] = np.arange(5) + 300
    table = dataclasses.replace(
        manifest_of([0]), label=labels, class_names=[str(i) for i in range(310)],
        **{name: np.broadcast_to(np.int64(0), count) for name in COLUMNS if name != "label"},
    )  # fmt: skip
    expected = held_out_by_0_1_0(table, fraction)
    tracemalloc.start()
    found = hold_out(table, fraction)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    assert peak < 6 * count + 24 * 2**20
