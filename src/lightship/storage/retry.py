"""Retry: how long a call is tried again.

A transient error (5xx, throttling, a reset, a cut body, silence) is retried after pauses with full
jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015) until the
deadline; a permanent one (403, 404, a damaged archive) is raised at once: see errors.py. Progress
moves the deadline: it bounds silence, not the size of the work.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from lightship.errors import ConfigError
from lightship.storage.errors import NoCredentials, StorageTimeout, permanent, reason
from lightship.storage.urls import redact

T = TypeVar("T")
_DEADLINE = "LIGHTSHIP_STORAGE_DEADLINE_S"
_SHORT_S = "8"  # of each call, where a fit retries for two minutes


@dataclass(frozen=True)
class Limits:
    """Bounds of every call; LIGHTSHIP_STORAGE_DEADLINE_S sets `total_s` and shortens the others."""

    connect_s: float = 5.0
    read_s: float = 15.0
    """Max silence of an open connection before the request is made again."""
    total_s: float = 120.0
    """Max time without progress in which a failing call is tried again."""
    probe_s: float = 15.0
    """Max time of `check_writable` for a remote output."""
    identity_s: float = 5.0
    """Max time in which credentials are looked for again, by a process that never had any."""
    attempts: int = 24
    backoff_s: float = 0.1
    backoff_cap_s: float = 8.0
    slowest_bytes_per_s: float = 2**18
    """A try that transfers n bytes may take total_s + n / this."""
    in_flight: int = 64
    """Requests at once, for asynchronous file systems."""
    threads: int = 8
    """Reads at once, for the others."""

    @classmethod
    def now(cls) -> "Limits":
        """The limits in force. Raises ConfigError for a deadline that is not a positive number."""
        text = os.environ.get(_DEADLINE)
        if not text:
            return cls()
        try:
            total_s = float(text)
        except ValueError:
            total_s = 0.0
        if not 0 < total_s < float("inf"):
            raise ConfigError(f"LIGHTSHIP_STORAGE_DEADLINE_S is '{text}'; it must be seconds > 0")
        silent_s, probe_s = min(cls.read_s, total_s / 3), min(cls.probe_s, total_s)
        return cls(min(cls.connect_s, silent_s), silent_s, total_s, probe_s)


class Deadline:
    """The deadline of one call, moved by `progress`, and its failed tries.

    Args:
        url: What the call is about.
        size_bytes: Of what is transferred between two reports of progress.
        total_s: Default: that of `Limits.now()`.
        is_first: Whether the storage has not answered this process yet: if there are no credentials
            then, there probably never will be.
    """

    def __init__(
        self, url: str, size_bytes: int = 0, total_s: float | None = None, is_first: bool = True
    ):
        self.url, self.limits, self.tries, self.last = url, Limits.now(), 0, "no answer"
        self.is_first, self.began = is_first, time.monotonic()
        self.total_s = total_s or self.limits.total_s
        self.quiet_s = self.total_s + size_bytes / self.limits.slowest_bytes_per_s
        self.progress()

    def progress(self) -> None:
        """Restart the clock: something arrived."""
        now = time.monotonic()
        # A slow transfer may take `quiet_s`; a failing try is not repeated that long.
        self.ends, self.last_try_ends = now + self.quiet_s, now + self.total_s

    def try_s(self, size_bytes: int) -> float:
        """Seconds after which one try that sends so many bytes has stalled, and is made again."""
        return self.limits.read_s + size_bytes / self.limits.slowest_bytes_per_s

    def left_s(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.ends - time.monotonic())

    def expired(self) -> StorageTimeout:
        """The error to raise when no time is left."""
        within_s = self.quiet_s if not self.left_s() else self.total_s
        return StorageTimeout(
            f"{redact(self.url)}: no success within {within_s:.3g} s (failed tries: "
            f"{self.tries}; last: {self.last}); LIGHTSHIP_STORAGE_DEADLINE_S sets the bound"
        )

    def pause_s(self, error: Exception) -> float:
        """Seconds to wait before the next try. Raises the call's error if none is left."""
        final = permanent(error, self.url)
        if final is error:
            raise error
        if final is not None and not isinstance(final, NoCredentials):
            raise final from error
        self.tries, self.last = self.tries + 1, reason(error)
        max_s = min(self.limits.backoff_cap_s, self.limits.backoff_s * 2.0**self.tries)
        ends, late = self.last_try_ends, None
        if final is not None and self.is_first:
            ends, late = min(ends, self.began + self.limits.identity_s), final
            max_s = min(max_s, self.limits.identity_s / 5)  # a longer pause would be the last one
        pause_s = random.uniform(0, max_s)
        if self.tries >= self.limits.attempts or time.monotonic() + pause_s >= ends:
            raise (late or self.expired()) from error
        return pause_s


def with_retries(operation: Callable[[], T], deadline: Deadline) -> T:
    """Try until it works. A try that hangs is left to `parallel.run_within`."""
    while True:
        try:
            return operation()
        except Exception as error:
            pause_s = deadline.pause_s(error)
        time.sleep(pause_s)


@contextmanager
def short_deadline() -> Iterator[None]:
    """Let storage give up early, for a command that only looks, unless the environment says when.

    For the whole process.
    """
    if _DEADLINE in os.environ:
        yield
        return
    os.environ[_DEADLINE] = _SHORT_S
    try:
        yield
    finally:
        del os.environ[_DEADLINE]
