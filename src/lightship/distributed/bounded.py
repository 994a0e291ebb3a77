"""Calls that end in bounded time, whatever torch's store does."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar, cast

T = TypeVar("T")


class NoAnswer(Exception):
    """A call has not returned within its bound."""


def call_within(bound_s: float, call: Callable[[], T]) -> T:
    """The result of `call`, which is made in a thread. Blocks for `bound_s` at most.

    Torch's client of a store waits without bound for a host that is frozen or cut off: after its
    time-out it cancels the request, and waits for the answer to that. The thread is then left.

    Raises:
        NoAnswer: The time is up.
        BaseException: What `call` raises.
    """
    answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def make() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    Thread(target=make, daemon=True).start()
    try:
        answer, error = answers.get(timeout=bound_s)
    except Empty:
        raise NoAnswer(f"no answer within {bound_s:.0f} s") from None
    if error is not None:
        raise error
    return cast(T, answer)
