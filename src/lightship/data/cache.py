"""The block cache: what was read from a bucket, kept on local disk for later epochs and runs."""

import contextlib
import errno
import fcntl
import hashlib
import os
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lightship import storage
from lightship.exits import ConfigError
from lightship.storage import Data
from lightship.storage.ahead import ReadAhead

_CRC_BYTES = 4
_LEFT_AFTER_CLEARING = 0.9


class BlockCache:
    """Spans of files on local disk, the least recently used of which go when there are too many.

    Safe between the ranks of a node, and between runs: files appear whole, carry a CRC-32 of their
    content that each read checks, and may vanish while others read.

    Args:
        folder: Where; made if need be.
        max_bytes: Of all files.
        of: What tells this data set from others, and from itself after a change.
    """

    def __init__(self, folder: Path, max_bytes: int, of: str) -> None:
        self.folder, self.max_bytes, self.of = folder, max_bytes, of
        folder.mkdir(parents=True, exist_ok=True)
        self._size_bytes = sum(size for _, size, _ in self._files())

    def load(self, span: storage.Span) -> bytes | None:
        """The span's bytes if they are here and whole. Blocks on the disk."""
        path = self._path(span)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        data = content[_CRC_BYTES:]
        if zlib.crc32(data).to_bytes(_CRC_BYTES) != content[:_CRC_BYTES]:
            path.unlink(missing_ok=True)
            return None
        return data

    def store(self, span: storage.Span, data: Data) -> None:
        """Keep a span's bytes; clears up if there are too many. Blocks on the disk.

        Raises:
            ConfigError: The disk is full, or refuses.
        """
        path = self._path(span)
        temporary_path = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary_path.open("wb") as file:
                file.write(zlib.crc32(data).to_bytes(_CRC_BYTES))
                file.write(data)
            os.replace(temporary_path, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary_path.unlink()
            what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"fails ({error})"
            raise ConfigError(
                f"the block cache's disk {what}: {self.folder}; lower --data.cache_gib or set "
                "LIGHTSHIP_CACHE to another folder"
            ) from error
        self._size_bytes += len(data) + _CRC_BYTES
        if self._size_bytes > self.max_bytes:
            self._clear()

    def _path(self, span: storage.Span) -> Path:
        place = f"{self.of}\n{span.url}\n{span.start}\n{span.end}"
        key = hashlib.sha256(place.encode()).hexdigest()[:32]
        return self.folder / key[:2] / key

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of each file."""
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path

    def _clear(self) -> None:
        """Remove the least recently used; one rank at a time, and the others need not wait."""
        with (self.folder / ".clearing").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            files = sorted(self._files())
            size_bytes = sum(size for _, size, _ in files)
            for _, size, path in files:
                if size_bytes <= _LEFT_AFTER_CLEARING * self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                size_bytes -= size
            self._size_bytes = size_bytes


class CachedReads:
    """`ReadAhead` with a cache before it: what is here is not asked for again.

    Args:
        reads: Asked for what is not here.
        cache: Where it is kept.
    """

    def __init__(self, reads: ReadAhead, cache: BlockCache) -> None:
        self.reads, self.cache = reads, cache
        self._storing = ThreadPoolExecutor(1, "lightship-cache")
        self._under_way: dict[storage.Span, Future[Data]] = {}
        self._stored: deque[Future[None]] = deque()

    def begin(self, span: storage.Span) -> "Future[Data]":
        """As `ReadAhead.begin`; blocks for the disk if the span is here.

        Raises:
            ConfigError: Something before it could not be kept.
        """
        while self._stored and self._stored[0].done():
            self._stored.popleft().result()
        if (under_way := self._under_way.get(span)) is not None:
            return under_way
        future: Future[Data] = Future()
        data = self.cache.load(span) if span.end != span.start else b""
        if data is not None:
            future.set_result(data)
            return future
        future = self._under_way[span] = self.reads.begin(span)
        future.add_done_callback(lambda done: self._keep(span, done))
        return future

    def as_completed(self, futures: Iterable["Future[Data]"]) -> Iterator["Future[Data]"]:
        """As `ReadAhead.as_completed`."""
        return self.reads.as_completed(futures)

    def result(self, future: "Future[Data]") -> Data:
        """As `ReadAhead.result`."""
        return self.reads.result(future)

    def close(self) -> None:
        """As `ReadAhead.close`."""
        self.reads.close()
        self._storing.shutdown(wait=False, cancel_futures=True)

    def _keep(self, span: storage.Span, done: "Future[Data]") -> None:
        if done.cancelled() or done.exception() is not None:
            self._under_way.pop(span, None)
            return
        with contextlib.suppress(RuntimeError):  # closed
            self._stored.append(self._storing.submit(self._store, span, done.result()))

    def _store(self, span: storage.Span, data: Data) -> None:
        try:
            self.cache.store(span, data)
        finally:
            self._under_way.pop(span, None)
