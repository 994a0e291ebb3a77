"""Work of some ranks for which the others wait, and what happens if it fails."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightship.distributed import comm
from lightship.errors import ConfigError
from tests.dist.two_ranks import TIMEOUT_S, received, results, two_ranks


def long_work() -> str:
    time.sleep(2.5 * TIMEOUT_S)
    return "done"


def of_rank_0() -> str:
    return comm.broadcast_from_rank_0(long_work)


def of_the_first_of_a_node() -> str:
    return comm.local_rank_0_first(lambda: long_work() if comm.is_rank_0() else "cached")


def of_rank_1() -> str:
    return comm.on_every_rank(lambda: "quick" if comm.is_rank_0() else long_work())


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (of_rank_0, ["done", "done"]),
        (of_the_first_of_a_node, ["done", "cached"]),
        (of_rank_1, ["quick", "done"]),
    ],
)
def test_work_may_take_longer_than_the_timeout(work: Callable[[], str], expected: list) -> None:
    assert results(work) == expected


def refuse() -> None:
    raise ConfigError("the value 7")


def refused_on_rank_0() -> None:
    comm.on_rank_0(refuse)


def refused_on_rank_1() -> None:
    comm.on_every_rank(lambda: None if comm.is_rank_0() else refuse())


def refused_on_the_second_of_a_node() -> None:
    comm.local_rank_0_first(lambda: None if comm.is_rank_0() else refuse())


@pytest.mark.parametrize(
    "work", [refused_on_rank_0, refused_on_rank_1, refused_on_the_second_of_a_node]
)
def test_a_failure_on_one_rank_ends_all_with_its_text_and_code(work: Callable[[], None]) -> None:
    found = results(work)
    assert [answer[1:] for answer in found] == [(78, "the value 7")] * 2
    assert sorted(answer[0] for answer in found) == ["ConfigError", "LightshipError"]


def array_of_rank_0() -> tuple[bool, int]:
    """(whether it arrived, bytes of the largest message)"""
    expected = np.arange(3000, dtype=np.float32).reshape(100, 30)
    sizes, broadcast = [], comm.dist.broadcast

    def watched(tensor: Any, source: int) -> None:
        sizes.append(tensor.nbytes)
        broadcast(tensor, source)

    comm.dist.broadcast, comm._PIECE_BYTES = watched, 1000
    found = comm.broadcast_array(expected.copy() if comm.is_rank_0() else None)
    found += 0  # writable
    return found.dtype == expected.dtype and np.array_equal(found, expected), max(sizes)


def test_a_large_array_comes_in_pieces() -> None:
    assert results(array_of_rank_0) == [(True, 1000)] * 2


def endless() -> None:
    comm.on_rank_0(lambda: time.sleep(600))


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "PeerLost"), (signal.SIGSTOP, "TimeoutExpired")]
)
def test_a_worker_that_dies_or_freezes_is_noticed(number: int, name: str) -> None:
    with two_ranks(endless) as ranks:
        assert not ranks[1][1].poll(3 * TIMEOUT_S), "rank 1 waits as long as rank 0 works"
        os.kill(ranks[0][0].pid, number)
        assert received(ranks[1][1])[0] == name
