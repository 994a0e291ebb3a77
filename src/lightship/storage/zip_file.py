"""A zip's table of contents, read within bounds, and its entries."""

import itertools
import os
import re
import struct
import zipfile
from typing import Any, BinaryIO

from lightship.errors import DataError, LightshipError
from lightship.storage.bounds import (
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    MAX_ZIP_DIRECTORY_BYTES,
    MAX_ZIP_ENTRIES,
    check_unpacked,
)

_DOS = 0
_ENCRYPTED = 1
_LOCAL_HEADER_BYTES, _MAX_END_BYTES = 30, 2**17
_ENTRY_SIGNATURE = b"PK\x01\x02"
_DRIVE = re.compile(r"^[A-Za-z]:/")


class _Directory:
    """A file of which `zipfile` reads the table of contents, whose size it does not check."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def read(self, size: int = -1) -> bytes:
        if size < 0:  # the record at the end, with its comment
            return self.stream.read(_MAX_END_BYTES)
        if size > MAX_ZIP_DIRECTORY_BYTES:
            raise DataError(
                f"its table of contents has {size} bytes; at most {MAX_ZIP_DIRECTORY_BYTES} are "
                "read: unpack it, or make several zips of it"
            )
        data = self.stream.read(size)
        if (count := data.count(_ENTRY_SIGNATURE)) > MAX_ZIP_ENTRIES:
            raise DataError(
                f"it has {count} entries; at most {MAX_ZIP_ENTRIES} are read: unpack it, or make "
                "several zips of it"
            )
        return data

    def opened(self) -> None:
        self.read = self.stream.read  # type: ignore[method-assign]


class ZipFile:
    """An open zip, read-only; any thread.

    Args:
        stream: Its file.
        name: What to call it in messages.

    Attributes:
        entries: Path -> entry. Of a path that comes twice the last counts.
        folders: Paths of the folders that have an entry.

    Raises:
        DataError: It is damaged, or has more entries or longer names than are read.
    """

    def __init__(self, stream: Any, name: str):
        try:
            directory = _Directory(stream)
            self._zip = zipfile.ZipFile(directory)
            directory.opened()
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        except LightshipError:
            raise
        except (zipfile.BadZipFile, ValueError, struct.error, EOFError, NotImplementedError,
                OverflowError, MemoryError) as error:  # fmt: skip
            if isinstance(error.__context__, LightshipError):  # which zipfile takes for damage
                raise error.__context__ from None
            raise DataError(f"{name} is not a whole zip: {error}") from error
        infos = self._zip.infolist()
        size_bytes = stream.seek(0, os.SEEK_END)
        has_slashes = any("/" in entry.filename for entry in infos)
        self.entries: dict[str, zipfile.ZipInfo] = {}
        self.folders: list[str] = []
        for entry in infos:
            path = _plain_name(entry, has_slashes)
            if len(path.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
                raise DataError(
                    f"{name}: the name {path[:80]}... has more than {MAX_NAME_BYTES} bytes; rename "
                    "it"
                )
            if not 0 <= entry.header_offset < size_bytes:
                raise DataError(f"{name} is not a whole zip: {path} lies outside of it")
            if entry.file_size > MAX_FILE_BYTES:
                raise DataError(f"{name}: {path} is said to have {entry.file_size} bytes")
            if not entry.filename or entry.is_dir():  # is_dir() fails on an empty name
                self.folders.append(path)
            else:
                self.entries[path] = entry
        self._overlapping = _overlapping(infos)

    def open(self, path: str) -> BinaryIO:
        """The entry's plain bytes as a seekable file.

        Raises:
            DataError: It is packed in another way than stored or deflated, encrypted, overlaps
                another one, or unpacks to far more than images do.
        """
        entry = self.entries[path]
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile unpacks a piece of bzip2 and LZMA whole, however large it becomes.
            raise DataError(
                f"packed by method {entry.compress_type}; stored (0) and deflated (8) are read"
            )
        if entry.flag_bits & _ENCRYPTED:
            raise DataError("encrypted")
        if entry.header_offset in self._overlapping:
            raise DataError("it overlaps another entry")
        check_unpacked(entry.file_size, entry.compress_size, "it")
        return self._zip.open(entry)  # type: ignore[return-value]


def _plain_name(entry: zipfile.ZipInfo, has_slashes: bool) -> str:
    r"""The path that a name stands for: `/a/b`, `./a/b`, `a\b` and `C:\a\b` are `a/b`.

    A backslash separates where the zip was made on Windows, or where no name has a slash.
    """
    name = entry.filename
    if "\\" in name and (entry.create_system == _DOS or not has_slashes):
        name = entry.filename = name.replace("\\", "/")
    parts = _DRIVE.sub("", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _overlapping(infos: list[zipfile.ZipInfo]) -> set[int]:
    """Offsets of the entries that reach into the next one: how a small zip unpacks to PiB."""
    found = set()
    in_place = sorted((entry.header_offset, entry.compress_size) for entry in infos)
    for (start, size), (following, _) in itertools.pairwise(in_place):
        if start + _LOCAL_HEADER_BYTES + size > following:
            found |= {start, following}
    return found
