"""Parallel: the one executor for bounded work on storage.

All threads are daemons: a call that hangs is left behind and never keeps the process alive.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from lightship.storage.retry import Deadline

T = TypeVar("T")
R = TypeVar("R")
_GRACE_S = 1.0
"""Wait this much longer, so that the deadline within a call can name the cause."""


class Executor:
    """Makes calls on daemon threads, in the order of `submit`.

    At most `max_threads` calls and `max_bytes` are in flight; a call of more bytes runs alone. A
    thread is started when a call finds none idle, and waits for more calls until `close`.

    Args:
        max_threads: May be raised while in use.
        max_bytes: Bound of the sum of the sizes of calls in flight; None: unbounded.
        deadline: Of `as_completed`; each call that ends is progress. None: wait without a bound.
        stop_on_error: Begin no more calls after the first that raises.
        name: Of the threads.
    """

    def __init__(
        self,
        max_threads: int,
        max_bytes: int | None = None,
        deadline: Deadline | None = None,
        stop_on_error: bool = False,
        name: str = "lightship-storage",
    ) -> None:
        self.max_threads, self.max_bytes, self.deadline = max_threads, max_bytes, deadline
        self.stop_on_error, self.name = stop_on_error, name
        self._turn = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any], int]] = deque()
        self._bytes = self._threads = self._idle = 0
        self._is_closed = False

    def submit(self, call: Callable[[], T], size_bytes: int = 0) -> "Future[T]":
        """Queue a call. Does not block. The future is cancelled if this is closed."""
        future: Future[T] = Future()
        with self._turn:
            if self._is_closed:
                future.cancel()
                return future
            self._waiting.append((future, call, size_bytes))
            if self._idle:
                self._turn.notify()
            # A thread counts as idle until it has woken up: it takes one of many calls.
            if len(self._waiting) > self._idle and self._threads < self.max_threads:
                self._threads += 1
                threading.Thread(target=self._run, name=self.name, daemon=True).start()
        return future

    def as_completed(self, futures: Iterable["Future[T]"]) -> Iterator["Future[T]"]:
        """Each future when it is done or cancelled. Blocks; any thread.

        Raises:
            StorageTimeout: No call ended within the deadline.
        """
        done: SimpleQueue[Future[T]] = SimpleQueue()
        left = 0
        for future in futures:
            future.add_done_callback(done.put)
            left += 1
        if self.deadline:
            self.deadline.progress()  # time in which nobody waited does not count
        while left:
            try:
                bound_s = self.deadline.left_s() + _GRACE_S if self.deadline else None
                future = done.get(timeout=bound_s)
            except Empty:
                if self.deadline and not self.deadline.left_s():
                    raise self.deadline.expired() from None
            else:
                left -= 1
                yield future

    def close(self) -> None:
        """Cancel the calls that have not begun. Does not wait for the others."""
        with self._turn:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._turn.notify_all()
        for future, _, _ in waiting:
            future.cancel()

    def _run(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Wait for a call and make it. False once closed."""
        with self._turn:
            while not self._has_room():
                if self._is_closed:
                    return False
                self._idle += 1
                self._turn.wait()
                self._idle -= 1
            future, call, size_bytes = self._waiting.popleft()
            self._bytes += size_bytes
            if self._waiting and self._idle:
                self._turn.notify()  # there may be room for one more
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:  # the future's owner gets it
                if self.stop_on_error:
                    self.close()
                future.set_exception(error)
            else:
                future.set_result(result)
        with self._turn:
            self._bytes -= size_bytes
        if self.deadline:
            self.deadline.progress()
        return True

    def _has_room(self) -> bool:
        """Whether a call waits and may be in flight beside the others."""
        if not self._waiting:
            return False
        total_bytes = self._bytes + self._waiting[0][2]
        return not self._bytes or self.max_bytes is None or total_bytes <= self.max_bytes


def parallel_map(
    function: Callable[[T], R],
    items: Iterable[T],
    max_threads: int,
    deadline: Deadline | None = None,
) -> list[R]:
    """`function(item)` of each item, in their order, on at most `max_threads` threads. Blocks.

    The first error is raised at once: no more items are begun, those in flight are left behind.

    Raises:
        StorageTimeout: No call ended within `deadline`; None: wait without a bound.
    """
    executor = Executor(max_threads, deadline=deadline, stop_on_error=True)
    try:
        futures = [executor.submit(partial(function, item)) for item in items]
        for future in executor.as_completed(futures):
            if not future.cancelled():  # else the error that cancelled it comes too
                future.result()
        return [future.result() for future in futures]
    finally:
        executor.close()


def in_daemon(call: Callable[[], T], name: str = "lightship-storage") -> "Future[T]":
    """Make one call on a daemon thread."""
    executor = Executor(1, name=name)
    future = executor.submit(call)
    future.add_done_callback(lambda _: executor.close())
    return future


def run_within(deadline: Deadline, call: Callable[[], T]) -> T:
    """Make one call on a daemon thread and wait for it as long as there is progress.

    Raises:
        StorageTimeout: There was none within the deadline.
    """
    future = in_daemon(call)
    while not wait([future], deadline.left_s() + _GRACE_S).done:
        if not deadline.left_s():
            raise deadline.expired()
    return future.result()
