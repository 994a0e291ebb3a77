"""The block cache: what was read from a bucket, kept on local disk for later epochs and runs."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lightship import storage
from lightship.data.checksum import crc32
from lightship.storage import Data, ReadAhead

logger = logging.getLogger(__name__)
_FOLDER, _FILE = re.compile("[0-9a-f]{2}"), re.compile(r"\.?[0-9a-f]{32}")
_CRC_BYTES = 4
_QUEUE_BYTES = 128 * 2**20
_LOOK_AFTER, _CLEAR_ABOVE, _CLEAR_TO = 1 / 32, 15 / 16, 7 / 8  # of max_bytes
_turned_off: set[Path] = set()
"""Folders whose disk has failed in this process."""


class BlockCache:
    """Spans of files on local disk; beyond `max_bytes` the least recently used are removed.

    Safe between the ranks of a node, and between runs: files appear whole, carry a CRC-32 of their
    content that each read checks, and may vanish while others read. A disk that is full, fails or
    cannot be written turns the cache off with a warning; reads then come from the storage.

    Args:
        folder: Local folder; made if missing.
        max_bytes: Bound of all files, of all ranks of the node.
        of: Identifies the data set and its version (`Manifest.content_key`).
    """

    def __init__(self, folder: Path, max_bytes: int, of: str) -> None:
        self.folder, self.max_bytes, self.of = folder, max_bytes, of
        self._ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        self._unseen_bytes = float("inf")  # that the ranks may have stored since the last look
        with self._off_on_error():
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_off(self) -> bool:
        """Whether its disk has failed."""
        return self.folder in _turned_off

    def load(self, span: storage.Span) -> bytes | None:
        """The span's bytes if they are cached and whole. Blocks on the disk."""
        path = self._path(span)
        if self.is_off:
            return None
        with contextlib.suppress(FileNotFoundError), self._off_on_error():
            content = path.read_bytes()
            with contextlib.suppress(OSError):  # of another user
                os.utime(path)
            data = content[_CRC_BYTES:]
            if crc32(data).to_bytes(_CRC_BYTES) == content[:_CRC_BYTES]:
                return data
            path.unlink(missing_ok=True)
        return None

    def store(self, span: storage.Span, data: Data) -> None:
        """Keep a span's bytes; evict others if needed. Blocks on the disk."""
        size_bytes = len(data) + _CRC_BYTES
        if self.is_off or size_bytes > self.max_bytes:
            return
        path = self._path(span)
        temporary_path = path.with_name(f".{uuid.uuid4().hex}")
        with self._off_on_error():
            self._make_room(size_bytes)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary_path.open("wb") as file:
                    file.write(crc32(data).to_bytes(_CRC_BYTES))
                    file.write(data)
                os.replace(temporary_path, path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary_path.unlink()
                raise

    @contextlib.contextmanager
    def _off_on_error(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if not self.is_off:
                _turned_off.add(self.folder)
                logger.warning(
                    f"block cache off: {error.strerror or error} ({self.folder}); images are read "
                    "from the storage. LIGHTSHIP_CACHE sets another folder, --data.cache_gib its "
                    "size"
                )

    def _path(self, span: storage.Span) -> Path:
        place = f"{self.of}\n{span.url}\n{span.start}\n{span.end}"
        key = hashlib.sha256(place.encode()).hexdigest()[:32]
        return self.folder / key[:2] / key

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of each file of ours; no link is followed."""
        for folder in os.scandir(self.folder):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)):
                continue
            for file in os.scandir(folder):
                if _FILE.fullmatch(file.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        yield status.st_mtime, status.st_size, Path(file.path)

    def _make_room(self, size_bytes: int) -> None:
        """Check the total size, and evict, before the ranks may have stored too much."""
        self._unseen_bytes += size_bytes * self._ranks
        if self._unseen_bytes > _LOOK_AFTER * self.max_bytes:
            self._clear(size_bytes * self._ranks)
            self._unseen_bytes = size_bytes * self._ranks

    def _clear(self, room_bytes: int) -> None:
        """Remove the least recently used; one rank at a time, others skip it."""
        files = sorted(self._files())
        total_bytes = sum(size for _, size, _ in files) + room_bytes
        if total_bytes <= _CLEAR_ABOVE * self.max_bytes:
            return
        with open(self.folder / ".clearing", "w", opener=_open_no_link) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            for _, size, path in files:
                if total_bytes <= _CLEAR_TO * self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total_bytes -= size


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


class CachedReads:
    """`ReadAhead` behind a cache: what is cached is not read again.

    Args:
        reads: Reads what is not cached.
        cache: Keeps what was read.
    """

    def __init__(self, reads: ReadAhead, cache: BlockCache) -> None:
        self.reads, self.cache = reads, cache
        self._storing = ThreadPoolExecutor(1, "lightship-cache")
        self._under_way: dict[storage.Span, Future[Data]] = {}
        self._lock = threading.Lock()
        self._queued_bytes = 0

    def begin(self, span: storage.Span) -> "Future[Data]":
        """As `ReadAhead.begin`; blocks on the disk if the span is cached."""
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
        """As `ReadAhead.close`; what has been read is still stored, in the background."""
        self.reads.close()
        self._storing.shutdown(wait=False)

    def _keep(self, span: storage.Span, done: "Future[Data]") -> None:
        """Store what was read, unless too much is queued for the disk: then a later epoch may."""
        if not done.cancelled() and done.exception() is None and self._has_room(len(done.result())):
            with contextlib.suppress(RuntimeError):  # closed
                self._storing.submit(self._store, span, done.result())
                return
        self._under_way.pop(span, None)

    def _has_room(self, size_bytes: int) -> bool:
        with self._lock:
            has_room = not self.cache.is_off and self._queued_bytes + size_bytes <= _QUEUE_BYTES
            self._queued_bytes += size_bytes if has_room else 0
            return has_room

    def _store(self, span: storage.Span, data: Data) -> None:
        try:
            self.cache.store(span, data)
        finally:
            self._under_way.pop(span, None)
            with self._lock:
                self._queued_bytes -= len(data)
