"""Reading: spans at once or ahead of their use, in order, a bounded number in flight."""

import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal

from lightship.errors import LightshipError
from lightship.storage.archives import Archive
from lightship.storage.backend import PIECE_BYTES, Backend, Data, Span
from lightship.storage.errors import StorageTimeout
from lightship.storage.parallel import Executor
from lightship.storage.registry import call, read_span, resolve
from lightship.storage.retry import Deadline
from lightship.storage.web import Web

_MAX_BYTES = 64 * 2**20
"""In flight ahead of use; more would share the line with the reads that are due first."""
_PLAIN_NAME = re.compile(r"\w[\w.-]*")  # to which no file system gives a meaning


def read_bytes(url: str) -> bytes:
    """The whole file."""
    (data,) = read_spans([Span(url)])
    assert isinstance(data, bytes)
    return data


def read_whole(url: str, size_bytes: int) -> bytes:
    """The whole file, whose size is known. However long it takes, if it makes progress.

    In pieces, each with a deadline and retries of its own. In one: a small file, one of an archive,
    which is unpacked from its start, and one of a web server, which may know no ranges.
    """
    if size_bytes == 0:
        return b""
    backend, _ = resolve(url)
    if size_bytes <= PIECE_BYTES or isinstance(backend, Archive | Web):
        return bytes(call(url, "read", 0, None, size=size_bytes))
    reads, whole = ReadAhead(_MAX_BYTES // 2, Deadline(url, PIECE_BYTES)), io.BytesIO()
    edges = [*range(0, size_bytes, PIECE_BYTES), size_bytes]
    try:
        futures = deque(reads.begin(Span(url, *edge)) for edge in itertools.pairwise(edges))
        while futures:
            whole.write(reads.result(futures.popleft()))
    finally:
        reads.close()
    return whole.getvalue()


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end), exactly. Raises DataError if the file is shorter."""
    (data,) = read_spans([Span(url, start, end)])
    assert isinstance(data, bytes)
    return data


def read_spans(
    spans: Sequence[Span], on_error: Literal["raise", "return"] = "raise"
) -> list[bytes | Exception]:
    """Many reads at once, `Backend.max_reads` in flight; results in the order of `spans`.

    One GET a span, no HEAD. The first error is raised at once, and no more reads are begun. With
    on_error="return" a LightshipError takes the place of what could not be read; after a
    StorageTimeout the reads that have not begun get that error too.
    """
    if not spans:
        return []
    max_bytes = max(span.size_bytes for span in spans)
    reads = ReadAhead(None, Deadline(spans[0].url, max_bytes))
    expired: StorageTimeout | None = None
    try:
        futures = [reads.begin(span) for span in spans]
        for future in reads.as_completed(futures):
            error = None if future.cancelled() else future.exception()
            if error and not (on_error == "return" and isinstance(error, LightshipError)):
                raise error
            if isinstance(error, StorageTimeout) and not expired:
                expired = error
                reads.close()
    finally:
        reads.close()
    results: list[bytes | Exception] = []
    for future in futures:
        error = expired if future.cancelled() else future.exception()
        results.append(error if isinstance(error, Exception) else bytes(future.result()))
    return results


class ReadAhead:
    """Spans as futures, each read with its own deadline and retries.

    `Backend.max_reads` are in flight at once; the others wait their turn.

    Args:
        max_bytes: Bound of what is in flight; None: unbounded.
        deadline: Of `as_completed`; default: one for `max_bytes`.
    """

    def __init__(
        self, max_bytes: int | None = _MAX_BYTES, deadline: Deadline | None = None
    ) -> None:
        deadline = deadline or Deadline("the storage", max_bytes or 0)
        self._executor = Executor(1, max_bytes, deadline)
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
