"""Local: paths of this machine."""
# ruff: noqa: D102 (see backend.Backend)

import contextlib
import errno
import io
import os
import re
import stat
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lightship.errors import DataError
from lightship.storage.backend import (
    PIECE_BYTES,
    Selection,
    Source,
    length_of,
    piece,
    wrong_length,
)
from lightship.storage.file_table import FileTable, FileTableBuilder
from lightship.storage.retry import Deadline, Limits, with_retries

TEMPORARY = ".lightship-tmp"
COPIED_BYTES = 8 * PIECE_BYTES
"""Read and written at once by a copy."""
_OWN_STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""What a shell passes to this process, such as `--config <(...)`."""
_MAX_VISITS = 16
"""How often links may lead to one folder below a root."""
_TEMPORARY_NAME = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(TEMPORARY)}")


_PROBE_NAME, _OLD_S = re.compile(r"\.[0-9a-f]{32}\.probe"), 3600


class Local:
    """Paths of this machine."""

    max_reads = Limits.threads

    def connect(self, deadline: Deadline, path: str) -> None:
        pass

    def files(self, deadline: Deadline, path: str, selection: Selection) -> FileTable:
        max_files, skip = selection.max_files, selection.skip
        if os.path.isfile(path):
            return FileTable.of({"": os.path.getsize(path)})
        found = FileTableBuilder(path)
        folders: list[tuple[str, str, tuple[str, ...]]] = [(path, "", (os.path.realpath(path),))]
        visits: Counter[str] = Counter()
        while folders and (max_files is None or len(found) < max_files):
            folder, prefix, above = folders.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    inner = prefix + entry.name
                    if not _is_folder(entry):
                        _add_file(entry, inner, found)
                    elif skip is None or not skip(inner):
                        real = os.path.realpath(entry.path)
                        if real not in above:  # a link to a folder above would never end
                            _check_visits(visits, real, entry.path)
                            folders.append((entry.path, f"{inner}/", (*above, real)))
            deadline.progress()
        return found.finish()

    def size(self, deadline: Deadline, path: str) -> int | None:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):  # which may never end
            raise OSError(errno.ENODEV, "a pipe, socket or device; a file was expected", path)
        return status.st_size

    def modified(self, deadline: Deadline, path: str) -> float:
        return os.stat(path).st_mtime

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> bytes:
        with open(path, "rb", buffering=0 if end is None else -1, opener=_open_file) as file:
            if start:
                file.seek(start)
            data = file.read() if end is None else file.read(end - start)
            if end is not None and len(data) != end - start:
                raise wrong_length(path, os.fstat(file.fileno()).st_size, start, end, len(data))
        return data

    def open(self, deadline: Deadline, path: str) -> BinaryIO:
        return io.BufferedReader(_File(path, "rb", opener=_open_file))

    def write(self, deadline: Deadline, path: str, source: Source) -> None:
        with whole_file(Path(path)) as temporary_path, temporary_path.open("wb") as out:
            copy_source(source, out, deadline)

    def remove(self, deadline: Deadline, path: str) -> None:
        Path(path).unlink(missing_ok=True)


class _File(io.FileIO):
    """A file of which reads that fail are tried again: see errors.py for what fails for good.

    An error of a disk or of a network mount (EIO, ESTALE) is no damage of what is read.
    """

    def readinto(self, buffer: Any) -> int:
        """Read what comes first, at most what fits in."""
        try:
            return os.readv(self.fileno(), [buffer])
        except OSError:
            again = partial(os.readv, self.fileno(), [buffer])
            return with_retries(again, Deadline(str(self.name)))


def _open_file(path: str, flags: int) -> int:
    """`os.open` that neither waits for a pipe's writer nor gives a device, which may never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if path.startswith(_OWN_STREAMS):
        os.set_blocking(descriptor, True)
    elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise OSError(errno.ENODEV, "a pipe, socket or device; a file was expected", path)
    return descriptor


def _check_visits(visits: "Counter[str]", folder: str, path: str) -> None:
    """Raise DataError if links lead to a folder again and again: 40 of them may make 2^40 paths."""
    visits[folder] += 1
    if visits[folder] > _MAX_VISITS:
        raise DataError(
            f"{path}: links lead to the folder {folder} on more than {_MAX_VISITS} ways; remove "
            "the links, or put folders in their place"
        )


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_file(entry: "os.DirEntry[str]", path: str, to: FileTableBuilder) -> None:
    """Add the entry of a non-folder; a broken link is a file that cannot be read."""
    if entry.name.endswith(TEMPORARY):
        return
    with contextlib.suppress(OSError):
        if entry.is_file():
            to.add(path, entry.stat().st_size)
            return
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        itself = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(itself.st_mode) and not os.path.exists(entry.path):
            to.add(path, itself.st_size)
        else:
            to.add_special(path)


def copy_source(source: Source, out: BinaryIO, deadline: Deadline) -> None:
    """Write a source to `out` in pieces, each of which is progress."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            copy_stream(file, out, deadline)
        return
    for start in range(0, length_of(source), COPIED_BYTES):
        out.write(piece(source, start, COPIED_BYTES))
        deadline.progress()


def copy_stream(source: BinaryIO, out: BinaryIO, deadline: Deadline) -> None:
    """Copy the rest of `source` in pieces, each of which is progress."""
    while data := source.read(COPIED_BYTES):
        out.write(data)
        deadline.progress()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path`, whole and durable, or removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.parent / f".{uuid.uuid4().hex}{TEMPORARY}"
    try:
        yield temporary_path
        _make_durable(temporary_path, path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    try:
        _fsync(path.parent)
    except OSError as error:
        # A bucket mounted as a folder cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _make_durable(temporary_path: Path, path: Path) -> None:
    """Flush a file that is written, and give it its name."""
    try:
        _fsync(temporary_path)
        os.replace(temporary_path, path)
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise
        # A later start of the run has tidied up. The write is tried again; its caller then sees
        # who owns the run.
        raise OSError(errno.ESTALE, "removed while it was written", str(path)) from error


def remove_temporaries(folder: Path) -> None:
    """Remove what `whole_file` and, an hour ago, `api.check_writable` left directly in a folder.

    A probe that is younger may be of another start, which looks for it.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            is_left = _TEMPORARY_NAME.fullmatch(entry.name) or (
                _PROBE_NAME.fullmatch(entry.name)
                and time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD_S
            )
            if is_left and not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
