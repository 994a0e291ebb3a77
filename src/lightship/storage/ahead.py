"""Read-ahead: spans read in the background, in order, a bounded number in flight."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial

from lightship.errors import LightshipError
from lightship.storage.api import Span, read_span, resolve
from lightship.storage.backend import Backend, Data
from lightship.storage.parallel import Executor
from lightship.storage.retry import Deadline

_MAX_BYTES = 64 * 2**20  # in flight; more would share the line with the reads that are due first
_PLAIN_NAME = re.compile(r"\w[\w.-]*")  # to which no file system gives a meaning


class ReadAhead:
    """Spans as futures, each read with its own deadline and retries.

    At most 64 MiB are in flight at once, in `Backend.max_reads` reads; the others wait their turn.
    """

    def __init__(self) -> None:
        self._executor = Executor(1, _MAX_BYTES, Deadline("the storage", _MAX_BYTES))
        self._folders: dict[str, tuple[Backend, str]] = {}

    def begin(self, span: Span) -> "Future[Data]":
        """Read [start, end) of a file, both given, in its turn. Does not block; see `result`."""
        future: Future[Data] = Future()
        if span.end == span.start:
            future.set_result(b"")
            return future
        try:
            backend, path = self._resolve(span.url)
        except LightshipError as error:
            future.set_exception(error)
            return future
        self._executor.max_threads = max(self._executor.max_threads, backend.max_reads)
        return self._executor.submit(partial(read_span, backend, path, span), span.size_bytes)

    def as_completed(self, futures: Iterable["Future[Data]"]) -> Iterator["Future[Data]"]:
        """Each future when it is done. Blocks while any read makes progress; any thread.

        Raises:
            StorageTimeout: None did within the storage's deadline.
        """
        return self._executor.as_completed(futures)

    def result(self, future: "Future[Data]") -> Data:
        """What was read. Blocks as `as_completed`.

        Raises:
            LightshipError: As `storage.read_range`.
        """
        if not future.done():
            next(self.as_completed([future]))
        return future.result()

    def close(self) -> None:
        """Begin no more reads. Does not wait for those in flight."""
        self._executor.close()

    def _resolve(self, url: str) -> tuple[Backend, str]:
        """As `resolve`, but once a folder, if names are plain: it costs an eighth of a GET."""
        folder, _, name = url.rpartition("/")
        path = folder.partition("://")[2] if "://" in url else folder
        if not path or "::" in url or not _PLAIN_NAME.fullmatch(name):
            return resolve(url)
        if (found := self._folders.get(folder)) is None:
            found = self._folders[folder] = resolve(folder)
        return found[0], f"{found[1]}/{name}"
