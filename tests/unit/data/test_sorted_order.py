"""Version 1 of the order: runs that began with it keep their ids for good."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from lightship.data.order import Order
from lightship.data.sorted_order import SortedOrder, permutation


def in_blocks(num_samples: int, per_block: int, batch_size: int, seed: int = 0) -> SortedOrder:
    edges = np.append(np.arange(0, num_samples, per_block), num_samples)
    return SortedOrder(num_samples, batch_size, seed, edges, (len(edges) - 1) * 2**22)


def test_order_is_fixed_for_good() -> None:
    """A run must be resumable by a later version: these numbers may never change."""
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_order_in_blocks_is_fixed_for_good() -> None:
    ids = in_blocks(20, 4, 5, seed=1).epoch(2).tolist()
    assert ids == [
        [17, 10, 16, 3, 8],
        [19, 6, 2, 9, 18],
        [4, 1, 14, 11, 7],
        [0, 13, 5, 12, 15],
    ]


@pytest.mark.parametrize(
    ("order", "digest"),
    [(SortedOrder(1000, 24, 3), "aa1fbce74a01dbc3"),
     (in_blocks(5000, 37, 128, 3), "68c4eae5c1374254")],
    ids=["shuffled", "blocks"],
)  # fmt: skip
def test_ids_are_those_of_0_1_0(order: SortedOrder, digest: str) -> None:
    """The hashes are of what the code before version 2 gave."""
    ids = order.epoch(4)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("order", [SortedOrder(100, 24, 1), in_blocks(100, 7, 24)])
def test_places_are_the_inverse_of_ids(order: Order) -> None:
    line = np.arange(96)
    ids = order.ids(1, line)
    assert order.places(1, ids).tolist() == line.tolist()
    assert (order.places(1, np.setdiff1d(np.arange(100), ids)) == -1).all()


def test_order_is_the_same_in_another_process() -> None:
    code = (
        "from lightship.data.sorted_order import permutation; print(permutation(9, 5, 2).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(permutation(9, 5, 2).tolist())
