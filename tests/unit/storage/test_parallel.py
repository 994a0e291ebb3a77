"""The executor of storage: order, bounds, errors and deadlines."""

import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from lightship.storage import StorageTimeout
from lightship.storage.parallel import (
    Executor,
    in_daemon,
    parallel_map,
    run_within,
)
from lightship.storage.retry import Deadline

pytestmark = pytest.mark.timeout(60)


def until(is_true) -> None:
    ends = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.001)


class Gate:
    """A call that waits until it may end."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may_end = threading.Event()

    def __call__(self, item: int) -> int:
        self.begun.append(item)
        assert self.may_end.wait(30)
        return item


def test_results_stand_in_the_order_of_the_items() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return 2 * item

    assert parallel_map(work, range(50), 8) == [2 * item for item in range(50)]
    assert parallel_map(work, [], 8) == []


def test_an_error_is_raised_at_once_and_begins_no_more() -> None:
    """Though another thread, begun before, is not done yet."""
    gate = Gate()

    def work(item: int) -> None:
        if item:
            gate.begun.append(item)
            raise ValueError(item)
        gate(item)

    with pytest.raises(ValueError, match="1"):
        parallel_map(work, range(100), 2)
    gate.may_end.set()
    assert sorted(gate.begun) == [0, 1]


@pytest.mark.parametrize(
    ("max_threads", "max_bytes", "sizes", "begin"),
    [
        (3, None, [1] * 10, 3),
        (8, 10, [4, 4, 4, 4], 2),
        (8, 10, [40, 1, 1], 1),
        (8, 10, [1, 40, 1], 1),
    ],
    ids=["threads", "bytes", "a large one alone", "a large one waits"],
)
def test_calls_in_flight_are_bounded(max_threads, max_bytes, sizes, begin) -> None:
    gate, executor = Gate(), Executor(max_threads, max_bytes)
    futures = [executor.submit(partial(gate, i), size) for i, size in enumerate(sizes)]
    until(lambda: len(gate.begun) == begin)
    time.sleep(0.05)
    assert sorted(gate.begun) == list(range(begin))
    gate.may_end.set()
    assert {future.result() for future in executor.as_completed(futures)} == set(range(len(sizes)))
    executor.close()


def test_one_call_at_a_time_takes_one_thread() -> None:
    executor = Executor(64)
    for _ in range(20):
        until(lambda: executor._idle == executor._threads)
        executor.submit(int).result()
    assert executor._threads == 1
    executor.close()


def test_close_cancels_what_has_not_begun_and_ends_the_threads() -> None:
    gate, executor = Gate(), Executor(1, name="closing")
    futures = [executor.submit(partial(gate, i)) for i in range(3)]
    until(lambda: gate.begun)
    executor.close()
    assert [future.cancelled() for future in futures] == [False, True, True]
    assert executor.submit(int).cancelled()
    gate.may_end.set()
    assert futures[0].result() == 0
    until(lambda: "closing" not in {thread.name for thread in threading.enumerate()})


def test_an_error_of_one_call_leaves_the_others() -> None:
    executor = Executor(1)
    bad, good = executor.submit(partial(int, "x")), executor.submit(int)
    assert good.result() == 0
    with pytest.raises(ValueError, match="'x'"):
        bad.result()
    executor.close()


def test_silence_ends_at_the_deadline_and_progress_moves_it() -> None:
    gate = Gate()
    for call in (lambda: run_within(Deadline("s3://b", total_s=0.2), partial(gate, 0)),
                 lambda: parallel_map(gate, [1], 2, Deadline("s3://b", total_s=0.2))):  # fmt: skip
        with pytest.raises(StorageTimeout, match=r"s3://b: no success within 0\.2 s"):
            call()
    gate.may_end.set()
    began_s = time.monotonic()
    parallel_map(lambda _: time.sleep(0.5), range(5), 1, Deadline("s3://b", total_s=0.6))
    assert time.monotonic() - began_s > 2, "longer than the deadline and its grace"


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    program = "import threading\nfrom lightship.storage.parallel import Executor, in_daemon\n"
    program += "wait = threading.Event().wait\nin_daemon(wait)\nExecutor(1).submit(wait)\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_in_daemon_gives_the_result_and_ends_its_thread() -> None:
    assert in_daemon(lambda: 7, name="seven").result() == 7
    until(lambda: "seven" not in {thread.name for thread in threading.enumerate()})
