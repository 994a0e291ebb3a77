"""What each kind of storage does (local.py, fsspec_backend.py, archives.py, s3.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightship.errors import ConfigError, DataError
from lightship.storage.errors import WrongLength
from lightship.storage.file_table import FileTable
from lightship.storage.retry import Deadline
from lightship.storage.urls import redact

Data = bytes | memoryview
Source = Data | Path
PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; end None: to its end (then a cut object goes unnoticed)."""

    url: str
    start: int = 0
    end: int | None = None

    @property
    def size_bytes(self) -> int:
        """0 where that is unknown."""
        return 0 if self.end is None else self.end - self.start


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing."""

    path: str
    """Relative to the listed root, '/'-separated; empty if the root itself is the file."""
    size_bytes: int


@dataclass(frozen=True)
class Selection:
    """Which files a listing returns.

    Attributes:
        max_files: Stop when so many, or a few more, are found; None: all.
        skip: Whether to skip a folder, by its path below the root; for local paths only.
    """

    max_files: int | None = None
    skip: Callable[[str], bool] | None = None


class Backend(Protocol):
    """One kind of storage: a single, blocking try of each call; api.py adds retries.

    Each method gets the deadline of its call, to report progress, and the path as this storage
    spells it. It raises whatever its library raises; errors.py says what that means.
    """

    max_reads: int
    """Reads in flight at once."""

    def connect(self, deadline: Deadline, path: str) -> None:
        """Open the connections that a first read needs."""

    def files(self, deadline: Deadline, path: str, selection: Selection) -> FileTable:
        """The files under `path`; for a file, one entry with an empty path."""

    def size(self, deadline: Deadline, path: str) -> int | None:
        """Bytes of a file; None for a folder."""

    def modified(self, deadline: Deadline, path: str) -> float:
        """When the file was written, in Unix time."""

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        """Bytes [start, end) of a file, exactly; end None: to its end."""

    def write(self, deadline: Deadline, path: str, source: Source) -> None:
        """Write the file as a whole."""

    def remove(self, deadline: Deadline, path: str) -> None:
        """Remove the file if it exists."""


def length_of(source: Source) -> int:
    """Bytes."""
    return source.stat().st_size if isinstance(source, Path) else memoryview(source).nbytes


def piece(source: Source, start: int, count: int) -> bytes:
    """At most `count` bytes of a source."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            file.seek(start)
            return file.read(count)
    return bytes(memoryview(source).cast("B")[start : start + count])


def wrong_length(path: str, size: int | None, start: int, end: int, got: int) -> Exception:
    """The error for `got` bytes of [start, end) from a file of `size` bytes (None: unknown)."""
    name, wanted = redact(path), f"bytes {start} to {end}"
    if size is not None and size < end:
        return DataError(f"{name} has {size} bytes; {wanted} were expected: truncated or replaced")
    if got == size:
        return ConfigError(f"{name}: the server sent the whole file for {wanted}; download it")
    return WrongLength(f"got {got} bytes for {wanted}")
