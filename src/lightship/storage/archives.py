"""Archives: the entries of a zip or a tar as files."""
# ruff: noqa: D102 (see backend.Backend)

import io
import posixpath
import threading
from abc import abstractmethod
from itertools import islice
from typing import Any, BinaryIO

from lightship.errors import ConfigError, DataError, LightshipError
from lightship.storage.backend import Data, Selection, Source
from lightship.storage.file_table import FileTable, FileTableBuilder
from lightship.storage.retry import Deadline, Limits
from lightship.storage.tar_headers import read_headers
from lightship.storage.urls import redact
from lightship.storage.zip_file import ZipFile

_MAX_LINKS = 40


class Archive:
    """An open archive, read-only.

    Attributes:
        sizes: Path -> bytes of each file in it.
    """

    max_reads = Limits.threads
    sizes: dict[str, int]

    @abstractmethod
    def open_entry(self, path: str) -> BinaryIO:
        """A file in it."""

    def connect(self, deadline: Deadline, path: str) -> None:
        pass

    def files(self, deadline: Deadline, path: str, selection: Selection) -> FileTable:
        if path in self.sizes:
            return FileTable.of({"": self.sizes[path]})
        prefix = f"{path}/" if path else ""
        names = (name for name in self.sizes if name.startswith(prefix))
        found = FileTableBuilder()
        for name in islice(names, selection.max_files):
            found.add(name.removeprefix(prefix), self.sizes[name])
        if not len(found):
            raise FileNotFoundError(path)
        return found.finish()

    def size(self, deadline: Deadline, path: str) -> int | None:
        if path in self.sizes:
            return self.sizes[path]
        if any(name.startswith(f"{path}/" * bool(path)) for name in self.sizes):
            return None
        raise FileNotFoundError(path)

    def modified(self, deadline: Deadline, path: str) -> float:
        raise NotImplementedError("times in archives")

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        """What goes wrong is the entry's fault, unless the storage or the system says otherwise."""
        if (size := self.size(deadline, path)) is None:
            raise IsADirectoryError(path)
        stop = size if end is None else end
        try:
            with self.open_entry(path) as file:
                file.seek(start)
                data = file.read(max(0, stop - start))
        except MemoryError:
            raise
        except Exception as error:  # any damage
            is_entrys = type(error) is DataError or not isinstance(error, LightshipError)
            if not is_entrys or (isinstance(error, OSError) and error.errno is not None):
                raise
            reason = str(error) or type(error).__name__
            raise DataError(f"{redact(path)} cannot be read from its archive ({reason})") from error
        if len(data) != stop - start:
            raise DataError(
                f"{redact(path)} has {size} bytes according to its archive, but {len(data)} came "
                f"where {stop - start} were expected: the archive is damaged"
            )
        return data

    def open(self, deadline: Deadline, path: str) -> BinaryIO:
        if self.size(deadline, path) is None:
            raise IsADirectoryError(path)
        return self.open_entry(path)

    def write(self, deadline: Deadline, path: str, source: Source) -> None:
        raise ConfigError(f"{redact(path)}: archives and web addresses are only read")

    def remove(self, deadline: Deadline, path: str) -> None:
        raise ConfigError(f"{redact(path)}: archives and web addresses are only read")


class ZipArchive(Archive):
    """An open zip."""

    def __init__(self, stream: BinaryIO, name: str):
        self._zip = ZipFile(stream, name)
        self.sizes = {path: entry.file_size for path, entry in self._zip.entries.items()}

    def open_entry(self, path: str) -> BinaryIO:
        return self._zip.open(path)


class TarArchive(Archive):
    """An open tar, not compressed; links to files in it are followed."""

    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._turn = stream, threading.Lock()
        places: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        try:
            for member in read_headers(stream):
                path = _inside(member.path)
                if member.kind == "file":
                    places[path] = member.start, member.size
                elif member.kind == "link":
                    links[path] = _inside(posixpath.join(posixpath.dirname(path), member.target))
                elif member.kind == "hard link":
                    links[path] = _inside(member.target)
        except DataError as error:
            raise DataError(f"{name} is not a whole tar: {error}") from error
        for path in links:
            target = path
            for _ in range(_MAX_LINKS):
                target = links.get(target, target)
            if target in places:
                places[path] = places[target]
        self._places = places
        self.sizes = {path: size for path, (_, size) in places.items()}

    def open_entry(self, path: str) -> BinaryIO:
        start, size = self._places[path]
        return io.BufferedReader(_Part(self._stream, self._turn, start, size))


def _inside(path: str) -> str:
    """A path below the root of an archive."""
    return posixpath.normpath(f"/{path}").lstrip("/")


class _Part(io.RawIOBase):
    """Bytes [start, start + size) of a file that several threads read."""

    def __init__(self, stream: Any, turn: threading.Lock, start: int, size: int):
        self.stream, self.turn, self.start, self.size, self.at = stream, turn, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        with self.turn:
            self.stream.seek(self.start + self.at)
            data = self.stream.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
