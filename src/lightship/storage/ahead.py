"""Reads ahead of their need: begun in the order asked for, a bounded number of them under way."""

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from lightship.storage import Span, resolve
from lightship.storage.backends import Data
from lightship.storage.retry import Deadline, Limits, persist

_IN_FLIGHT_BYTES = 64 * 2**20  # or later reads would take their share of the line from the first
_LOOK_S = 0.5
_PLAIN_NAME = re.compile(r"\w[\w.-]*")  # that no file system gives a meaning of its own
_Read = tuple[Span, "Future[Data]"]


class ReadAhead:
    """Spans as futures, each read with a deadline and retries of its own.

    At most 64 MiB are under way at once, in as many reads as the storage serves (`reads_at_once`);
    the others wait their turn.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._waiting: deque[_Read] = deque()
        self._bytes = 0
        self._threads = self._idle = 0
        self._is_closed = False
        self._moved_s = time.monotonic()
        self._folders: dict[str, tuple[Any, str]] = {}

    def begin(self, span: Span) -> "Future[Data]":
        """Read [start, end) of a file, both given, in its turn. Does not block; see `result`."""
        future: Future[Data] = Future()
        if span.end == span.start:
            future.set_result(b"")
            return future
        with self._turn:
            self._waiting.append((span, future))
            if self._idle:
                self._turn.notify()
            # A thread stays idle until it has woken up: it takes one of many that come at once.
            if len(self._waiting) > self._idle and self._threads < self._most_threads(span):
                self._threads += 1
                threading.Thread(target=self._read_all, name="lightship-read", daemon=True).start()
        return future

    def as_completed(self, futures: Iterable["Future[Data]"]) -> Iterator["Future[Data]"]:
        """Each future when it is done, first those that are. Any thread.

        Blocks as long as any read makes progress, within the storage's deadline.

        Raises:
            StorageTimeout: None made any.
        """
        done: SimpleQueue[Future[Data]] = SimpleQueue()
        awaited = 0
        for future in futures:
            future.add_done_callback(done.put)
            awaited += 1
        patience, seen_s = Deadline("the storage", _IN_FLIGHT_BYTES), self._moved_s
        while awaited:
            try:
                future = done.get(timeout=_LOOK_S)
            except Empty:
                if seen_s != self._moved_s:
                    seen_s = self._moved_s
                    patience.progress()
                elif not patience.left_s():
                    raise patience.expired() from None
            else:
                awaited -= 1
                yield future

    def result(self, future: "Future[Data]") -> Data:
        """What was read. Blocks as `as_completed`.

        Raises:
            LightshipError: What `storage.read_range` raises.
        """
        if not future.done():
            next(self.as_completed([future]))
        return future.result()

    def close(self) -> None:
        """Begin no more. Does not wait for the reads under way."""
        with self._turn:
            self._is_closed = True
            while self._waiting:
                self._waiting.pop()[1].cancel()
            self._turn.notify_all()

    def _most_threads(self, span: Span) -> int:
        limits = Limits.now()
        try:
            return self._resolve(span.url)[0].reads_at_once(limits)
        except Exception:
            return 1  # its own read will raise it

    def _read_all(self) -> None:
        """Read what waits, one after the other, until there is no more to come."""
        done_bytes = 0
        while (read := self._next(done_bytes)) is not None:
            span, future = read
            try:
                future.set_result(self._read(span))
            except BaseException as error:
                future.set_exception(error)
            done_bytes = _size(span)

    def _next(self, done_bytes: int) -> _Read | None:
        with self._turn:
            if done_bytes:
                self._bytes -= done_bytes
                self._moved_s = time.monotonic()
            while not self._is_closed:
                if self._waiting:
                    size = _size(self._waiting[0][0])
                    if not self._bytes or self._bytes + size <= _IN_FLIGHT_BYTES:
                        self._bytes += size
                        read = self._waiting.popleft()
                        if self._waiting and self._idle:
                            self._turn.notify()  # there may be room for one more
                        return read
                self._idle += 1
                self._turn.wait()
                self._idle -= 1
        return None

    def _read(self, span: Span) -> Data:
        backend, path = self._resolve(span.url)
        patience = Deadline(span.url, _size(span))
        return persist(partial(backend.read, patience, path, span.start, span.end), patience)

    def _resolve(self, url: str) -> tuple[Any, str]:
        """As `resolve`, but once a folder, if names are plain: it costs an eighth of a GET."""
        folder, _, name = url.rpartition("/")
        path = folder.partition("://")[2] if "://" in url else folder
        if not path or "::" in url or not _PLAIN_NAME.fullmatch(name):
            return resolve(url)
        if (found := self._folders.get(folder)) is None:
            found = self._folders[folder] = resolve(folder)
        return found[0], f"{found[1]}/{name}"


def _size(span: Span) -> int:
    assert span.end is not None
    return span.end - span.start
