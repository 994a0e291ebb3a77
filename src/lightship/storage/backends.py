"""Backends: one try of each storage call, on local paths and any fsspec file system (S3: s3.py).

Used by the storage's own modules alone; __init__.py explains the calls and adds deadlines, retries
and the meaning of errors. Each method gets the patience of its call, to report progress, and a path
as its file system spells it.
"""
# ruff: noqa: D102

import asyncio
import contextlib
import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightship.errors import ConfigError, DataError, LightshipError
from lightship.storage.retry import (
    Deadline,
    Limits,
    WrongLength,
    http_answer,
    result_of,
)
from lightship.storage.urls import redact

Data = bytes | memoryview
Source = Data | Path
PIECE_BYTES = 8 * 2**20
_TEMPORARY = ".lightship-tmp"


@dataclass(frozen=True)
class FileInfo:
    """One file of a listing."""

    path: str
    """Relative to the listed root, '/'-separated; empty if the root itself is the file."""
    size_bytes: int
    is_special: bool = False
    """Whether it is a pipe, a socket or a device, which must not be read."""


class Local:
    """Paths of this machine."""

    def reads_at_once(self, limits: Limits) -> int:
        return limits.threads

    def files(
        self,
        patience: Deadline,
        path: str,
        most: int | None = None,
        skip: Callable[[str], bool] | None = None,
    ) -> list[FileInfo]:
        if os.path.isfile(path):
            return [FileInfo("", os.path.getsize(path))]
        found: list[FileInfo] = []
        folders: list[tuple[str, str, tuple[str, ...]]] = [(path, "", (os.path.realpath(path),))]
        while folders and (most is None or len(found) < most):
            folder, prefix, above = folders.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    inner = prefix + entry.name
                    if not _is_folder(entry):
                        found += _file_info(entry, inner)
                    elif skip is None or not skip(inner):
                        real = os.path.realpath(entry.path)
                        if real not in above:  # a link to a folder above would never end
                            folders.append((entry.path, f"{inner}/", (*above, real)))
            patience.progress()
        return found

    def connect(self, patience: Deadline, path: str) -> None:
        pass

    def size(self, patience: Deadline, path: str) -> int | None:
        return None if os.path.isdir(path) else os.stat(path).st_size

    def modified(self, patience: Deadline, path: str) -> float:
        return os.stat(path).st_mtime

    def read(self, patience: Deadline, path: str, start: int, end: int | None) -> bytes:
        with open(path, "rb", buffering=0 if end is None else -1) as file:
            file.seek(start)
            data = file.read() if end is None else file.read(end - start)
            if end is not None and len(data) != end - start:
                raise _wrong_length(path, os.fstat(file.fileno()).st_size, start, end, len(data))
        return data

    def open(self, patience: Deadline, path: str) -> BinaryIO:
        return open(path, "rb")

    def write(self, patience: Deadline, path: str, source: Source) -> None:
        with whole_file(Path(path)) as temporary_path, temporary_path.open("wb") as out:
            if isinstance(source, Path):
                with source.open("rb") as file:
                    copy_stream(file, out, patience)
            else:
                out.write(source)

    def remove(self, patience: Deadline, path: str) -> None:
        Path(path).unlink(missing_ok=True)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file_info(entry: "os.DirEntry[str]", path: str) -> list[FileInfo]:
    """What is no folder; a link that leads nowhere is a file, which cannot be read."""
    if entry.name.endswith(_TEMPORARY):
        return []
    with contextlib.suppress(OSError):
        if entry.is_file():
            return [FileInfo(path, entry.stat().st_size)]
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        itself = entry.stat(follow_symlinks=False)
        leads_nowhere = stat.S_ISLNK(itself.st_mode) and not os.path.exists(entry.path)
        return [FileInfo(path, itself.st_size, is_special=not leads_nowhere)]
    return []


class Remote:
    """Any fsspec file system, through its blocking calls."""

    def __init__(self, fs: Any, is_archive: bool = False, is_read_only: bool = False):
        self.fs, self.is_archive, self.is_read_only = fs, is_archive, is_read_only
        # zipfile serves several threads, tarfile does not.
        serial = is_archive and fs.protocol != "zip"
        self.turn: Any = threading.Lock() if serial else contextlib.nullcontext()
        if is_archive:
            fs.find("")  # fills its index, which two threads must not do at once

    def reads_at_once(self, limits: Limits) -> int:
        return limits.threads

    def files(
        self,
        patience: Deadline,
        path: str,
        most: int | None = None,
        skip: Callable[[str], bool] | None = None,
    ) -> list[FileInfo]:
        info = self.fs.info(path)
        if info["type"] != "directory":
            return [FileInfo("", _size(info) or 0)]
        found = {} if most else self.fs.find(path, detail=True)
        for folder in self.fs.walk(path, detail=True) if most else ():
            found |= {each["name"]: each for each in folder[2].values()}
            if most and len(found) >= most:
                break
        names = ((name.removeprefix(path).lstrip("/"), i["size"]) for name, i in found.items())
        return [FileInfo(*each) for each in names]

    def connect(self, patience: Deadline, path: str) -> None:
        self.fs.exists(path)

    def size(self, patience: Deadline, path: str) -> int | None:
        return _size(self.fs.info(path))

    def modified(self, patience: Deadline, path: str) -> float:
        return self.fs.modified(path).timestamp()

    def read(self, patience: Deadline, path: str, start: int, end: int | None) -> Data:
        if self.is_archive:
            return self._read_member(patience, path, start, end)
        data = self.fs.cat_file(path, start=start or None, end=end)
        if end is not None and len(data) != end - start:
            raise _wrong_length(path, _size(self.fs.info(path)), start, end, len(data))
        return data

    def _read_member(self, patience: Deadline, path: str, start: int, end: int | None) -> Data:
        """Of an archive: what goes wrong is the member's fault, unless storage or system say so."""
        if self.size(patience, path) is None:
            raise IsADirectoryError(path)
        try:
            with self.turn:
                data = self.fs.cat_file(path, start=start or None, end=end)
        except (LightshipError, MemoryError):
            raise
        except Exception as error:  # an unknown method, a password, whatever damage leads it into
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error) or type(error).__name__
            raise DataError(f"{redact(path)} cannot be read from its archive ({reason})") from error
        if end is not None and len(data) != end - start:
            size = _size(self.fs.info(path))
            raise DataError(
                f"{redact(path)} has {size} bytes as its archive says, but there are {len(data)} "
                f"where {end - start} were expected: the archive is damaged"
            )
        return data

    def open(self, patience: Deadline, path: str) -> BinaryIO:
        return self.fs.open(path, "rb")

    def get_file(self, patience: Deadline, path: str, to_path: Path) -> None:
        self.fs.get_file(path, str(to_path))

    def write(self, patience: Deadline, path: str, source: Source) -> None:
        if self.is_read_only:
            raise ConfigError(f"{redact(path)}: archives and web addresses are only read")
        self.put(patience, path, source)
        if (size := _size(self.fs.info(path))) != length_of(source):
            raise WrongLength(f"{size} of {length_of(source)} bytes arrived")

    def put(self, patience: Deadline, path: str, source: Source) -> None:
        if not self.fs.async_impl:  # those are object stores: there are no folders to make
            self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        if isinstance(source, Path):
            self.fs.put_file(str(source), path)
        else:
            self.fs.pipe_file(path, bytes(source))

    def remove(self, patience: Deadline, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(path)


class Async(Remote):
    """fsspec file systems with coroutines (s3, http, gs, ...): many reads in flight at once."""

    def reads_at_once(self, limits: Limits) -> int:
        return limits.in_flight

    def read(self, patience: Deadline, path: str, start: int, end: int | None) -> Data:
        try:
            data = self.get(patience, path, start, end)
        except Exception as error:
            if http_answer(error)[0] != 416:
                raise
            data = b""
        if end is not None and len(data) != end - start:
            raise _wrong_length(path, _size(self.fs.info(path)), start, end, len(data))
        return data

    def get(self, patience: Deadline, path: str, start: int, end: int | None, **how: Any) -> Data:
        if start == 0 and end is None:  # bytes=0- of an empty object would be an error
            reading = self.fs._cat_file(path, **how)
        else:
            reading = self.fs._cat_file(path, start=start, end=end, **how)
        # Without grace: who waits for this call gives it, and gives up after that.
        future = asyncio.run_coroutine_threadsafe(reading, self.fs.loop)
        return result_of(future, patience, grace_s=0.0)


def _size(info: dict[str, Any]) -> int | None:
    if info["type"] == "directory":
        return None
    if info["size"] is None:
        raise DataError(f"{redact(info['name'])}: the server does not tell its size")
    return info["size"]


def _wrong_length(path: str, size: int | None, start: int, end: int, got: int) -> Exception:
    name, wanted = redact(path), f"bytes {start} to {end}"
    if size is not None and size < end:
        return DataError(f"{name} has {size} bytes; {wanted} were expected: truncated or replaced")
    if got == size:
        return ConfigError(f"{name}: the server sent the whole file for {wanted}; download it")
    return WrongLength(f"{got} bytes came for {wanted}")


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


def copy_stream(source: BinaryIO, out: BinaryIO, patience: Deadline) -> None:
    """All that is left of `source`, in pieces, each of which is progress."""
    while piece := source.read(8 * PIECE_BYTES):
        out.write(piece)
        patience.progress()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` whole and durable, or leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.parent / f".{uuid.uuid4().hex}{_TEMPORARY}"
    try:
        yield temporary_path
        _fsync(temporary_path)
        os.replace(temporary_path, path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    try:
        _fsync(path.parent)
    except OSError as error:
        # A bucket mounted as a folder has no folders to make durable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
