"""Calls in order on a daemon thread, which neither the caller nor the process's exit waits for."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
_LEAVE_S = 1.0


class Background:
    """A daemon thread that makes calls in order.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._began_s: float | None = None
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Queue `call`, which must not raise. Does not block."""
        self._calls.put(call)

    def begin(self, call: Callable[[], T]) -> "Future[T]":
        """Queue `call`, which may raise. Does not block."""
        outcome: Future[T] = Future()

        def resolve() -> None:
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

        self.submit(resolve)
        return outcome

    def result(self, call: Callable[[], T], bound_s: float) -> T:
        """Queue `call` and return its result. Blocks at most `bound_s`.

        Raises:
            TimeoutError: It has not returned by then.
            BaseException: Whatever `call` raised.
        """
        outcome = self.begin(call)
        try:
            outcome.exception(bound_s)
        except TimeoutError:
            raise TimeoutError("it does not answer") from None
        return outcome.result()

    def wait(self, bound_s: float) -> bool:
        """Wait for the calls so far, at most `bound_s`; whether all have returned."""
        done = Event()
        self.submit(done.set)
        return done.wait(bound_s)

    def busy_s(self) -> float:
        """Seconds that the current call has taken; 0 if there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def close(self) -> None:
        """End the thread after its queued calls. Blocks for at most a second."""
        self._calls.put(None)
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self._began_s = time.monotonic()
            call()
            self._began_s = None
