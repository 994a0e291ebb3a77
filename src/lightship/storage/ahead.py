"""Reads ahead of their need: begun in the order asked for, a bounded number of them under way."""

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from lightship.storage import Span, resolve
from lightship.storage.backends import Async
from lightship.storage.retry import Limits, Patience, persist, persist_async

_IN_FLIGHT_BYTES = 64 * 2**20  # or later reads would take their share of the line from the first
_LOOK_S = 0.5


class ReadAhead:
    """Spans as futures, each read with a deadline and retries of its own.

    At most `Limits.in_flight` reads and 64 MiB are under way at once (`Limits.threads` reads where
    the file system blocks); the others wait their turn.
    """

    def __init__(self) -> None:
        self._limits = Limits.now()
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Span, Future[bytes]]] = deque()
        self._count = self._bytes = 0
        self._moved_s = time.monotonic()
        self._threads = ThreadPoolExecutor(self._limits.threads, "lightship-read")

    def begin(self, span: Span) -> "Future[bytes]":
        """Read [start, end) of a file, both given, in its turn. Does not block; see `result`."""
        future: Future[bytes] = Future()
        if span.end == span.start:
            future.set_result(b"")
            return future
        with self._lock:
            self._waiting.append((span, future))
        self._start_some()
        return future

    def result(self, future: "Future[bytes]") -> bytes:
        """What was read. Blocks as long as any read makes progress, within the storage's deadline.

        Raises:
            LightshipError: What `storage.read_range` raises.
        """
        patience, seen_s = Patience("the storage", _IN_FLIGHT_BYTES), self._moved_s
        while not wait([future], _LOOK_S).done:
            if seen_s != self._moved_s:
                seen_s = self._moved_s
                patience.progress()
            elif not patience.left_s():
                raise patience.expired()
        return future.result()

    def close(self) -> None:
        """Begin no more. Does not wait for the reads under way."""
        with self._lock:
            while self._waiting:
                self._waiting.pop()[1].cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start_some(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                span, future = self._waiting[0]
                is_full = self._count >= self._limits.in_flight
                if self._count and (is_full or self._bytes + _size(span) > _IN_FLIGHT_BYTES):
                    return
                self._waiting.popleft()
                self._count += 1
                self._bytes += _size(span)
            self._start(span).add_done_callback(partial(self._ended, span, future))

    def _start(self, span: Span) -> "Future[bytes]":
        try:
            backend, path = resolve(span.url)
        except Exception as error:
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed
        patience = Patience(span.url, _size(span))
        place = (patience, path, span.start, span.end)
        if isinstance(backend, Async):
            reading = persist_async(partial(backend.read_async, *place), patience)
            return asyncio.run_coroutine_threadsafe(reading, backend.fs.loop)
        return self._threads.submit(persist, partial(backend.read, *place), patience)

    def _ended(self, span: Span, future: "Future[bytes]", reading: "Future[bytes]") -> None:
        with self._lock:
            self._count -= 1
            self._bytes -= _size(span)
            self._moved_s = time.monotonic()
        if reading.cancelled():
            future.cancel()
        elif error := reading.exception():
            future.set_exception(error)
        else:
            future.set_result(reading.result())
        self._start_some()


def _size(span: Span) -> int:
    assert span.end is not None
    return span.end - span.start
