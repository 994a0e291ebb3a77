"""A file of columns of integers that processes map into memory.

Columns lie at multiples of 64 bytes, little-endian, in the narrowest type that holds their values;
one whose values are all the same takes no bytes. Behind them follow a header (JSON: the place,
type and length of each column, the SHA-256 of all columns, and what the writer adds) and a trailer
of fixed size with the header's length and SHA-256. That last hash thus identifies the whole file.
"""

import hashlib
import json
import mmap
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightship import versions
from lightship.errors import DataError

_FORMAT = "manifest table"
_MAGIC = "lightship columns"
TRAILER_BYTES = 128
_TRAILER = re.compile(rf"{_MAGIC} (\d{{1,9}}) (\d{{1,12}}) ([0-9a-f]{{64}}) *\n")
_ALIGNED, _MAX_HEADER_BYTES, _MAX_CONTAINERS = 64, 2**26, 2**20
_PIECE_BYTES, _PIECE_ROWS = 4 * 2**20, 2**19
_FREE_ROWS, _MAX_ROWS_PER_BYTE = 2**20, 16  # of columns that take no bytes
_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "i8")
"""In the order in which they are tried."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The values of a column, or some of them in its order, in arrays of 4 MiB at most.

    Attributes:
        values: [N] of any integer type.
        chosen: [N] bool: which; None: all.
        numbers: What stands for each value; None: itself.
    """

    values: np.ndarray
    chosen: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.values), _PIECE_ROWS):
            part = slice(start, start + _PIECE_ROWS)
            piece = self.values[part]
            if self.chosen is not None:
                piece = piece[self.chosen[part]]
            yield piece if self.numbers is None else self.numbers[piece]

    def __len__(self) -> int:
        return len(self.values) if self.chosen is None else int(np.count_nonzero(self.chosen))

    def bounds(self) -> tuple[int, int]:
        """The least and the greatest value; (0, 0) if there is none."""
        found = [(int(piece.min()), int(piece.max())) for piece in self if len(piece)] or [(0, 0)]
        return min(low for low, _ in found), max(high for _, high in found)


class ColumnWriter:
    """Writes a file, in memory of a piece.

    Args:
        file: Open for writing and reading, and empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0
        self._content = hashlib.sha256()
        self._columns: dict[str, dict[str, Any]] = {}

    def add(self, name: str, pieces: Pieces) -> None:
        """Append a column."""
        low, high = pieces.bounds()
        count = len(pieces)
        if count and low == high:
            self._columns[name] = {"count": count, "value": low}
            return
        dtype = next(
            np.dtype(f"<{kind}")
            for kind in _TYPES
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max
        )
        self._put(bytes(-self._at % _ALIGNED))
        self._columns[name] = {"count": count, "type": dtype.str[1:], "start": self._at}
        for piece in pieces:
            self._put(np.ascontiguousarray(piece, dtype=dtype).data)

    def read(self, name: str) -> np.ndarray:
        """A column that was added, [N], mapped from the file."""
        about = self._columns[name]
        if "value" in about:
            return np.broadcast_to(_constant(about["value"]), (about["count"],))
        if not about["count"]:
            return np.zeros(0, dtype=np.int64)
        self._file.flush()
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(memory, f"<{about['type']}", about["count"], about["start"])

    def finish(self, about: Mapping[str, Any]) -> str:
        """Write the header, with `about` in it, and the trailer; the file's digest."""
        header = {
            "format": versions.VERSIONS[_FORMAT],
            "content": self._content.hexdigest(),
            "columns": self._columns,
            **about,
        }
        data = json.dumps(header).encode()
        digest = hashlib.sha256(data).hexdigest()
        trailer = f"{_MAGIC} {versions.VERSIONS[_FORMAT]} {len(data)} {digest}"
        self._file.write(data)
        self._file.write(trailer.ljust(TRAILER_BYTES - 1).encode() + b"\n")
        return digest

    def _put(self, data: Any) -> None:
        self._file.write(data)
        self._content.update(data)
        self._at += memoryview(data).nbytes


@dataclass(frozen=True)
class Trailer:
    """The end of a file.

    Attributes:
        header_bytes: Length of the header.
        digest: SHA-256 of the header, which has that of the columns: that of the file.
    """

    header_bytes: int
    digest: str

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Trailer":
        """Of the last `TRAILER_BYTES` of a file.

        Raises:
            DataError: They are not the end of such a file.
            NewerVersion: A newer version wrote them.
        """
        found = _TRAILER.fullmatch(data.decode("latin-1"))
        if len(data) != TRAILER_BYTES or not found:
            raise DataError(f"{where} is no table of columns, or is cut off")
        versions.check(_FORMAT, int(found[1]), where)
        if int(found[2]) > _MAX_HEADER_BYTES:
            raise DataError(f"{where} is damaged: its header has {found[2]} bytes")
        return cls(int(found[2]), found[3])


class Columns:
    """An open file: its header, and its columns as they are mapped.

    Header, types and places are checked here; the columns' own bytes only by `check_content`, for
    that reads them all.

    Args:
        path: Local. The file may be removed meanwhile, but not written.
        descriptor: Of the file, open for reading, which this object owns from now on; None: the
            file at `path` is opened.

    Attributes:
        descriptor: Open as long as this object lives.
        header: As it was written.
        digest: Of the whole file.
        size_bytes: Of the whole file.

    Raises:
        DataError: It is damaged.
        NewerVersion: A newer version wrote it.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.size_bytes = os.fstat(descriptor).st_size
        end = os.pread(descriptor, TRAILER_BYTES, max(0, self.size_bytes - TRAILER_BYTES))
        trailer = Trailer.parse(end, str(path))
        self._end = self.size_bytes - TRAILER_BYTES - trailer.header_bytes
        data = os.pread(descriptor, trailer.header_bytes, max(0, self._end))
        self.header = parse_header(data, trailer, self.size_bytes, str(path))
        self.digest = trailer.digest
        self._memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # rows of a batch lie apart: no reading ahead
            self._memory.madvise(mmap.MADV_RANDOM)

    def read(self, name: str) -> np.ndarray:
        """A column, [N], read-only. Raises DataError for one that does not fit the file."""
        about = self.header["columns"].get(name)
        bound = _FREE_ROWS + _MAX_ROWS_PER_BYTE * self.size_bytes
        try:
            count = about["count"]
            if "value" in about:
                return np.broadcast_to(_constant(about["value"]), (_checked(count, bound),))
            start = _checked(about["start"], self._end)
            room = (self._end - start) // _item_bytes(about["type"])
            if start % _ALIGNED:
                raise ValueError(f"start {start}")
            dtype = np.dtype(f"<{about['type']}")
            return np.frombuffer(self._memory, dtype, _checked(count, room), start)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{self.path} is damaged: column {name}: {error!r:.200}") from error

    def has(self, name: str) -> bool:
        """Whether there is a column of that name."""
        return name in self.header["columns"]

    def check_content(self) -> None:
        """Read all columns, and raise DataError if they are not as they were written. Blocks."""
        content, at = hashlib.sha256(), 0
        while piece := os.pread(self.descriptor, min(self._end - at, _PIECE_BYTES), at):
            content.update(piece)
            at += len(piece)
        if content.hexdigest() != self.header.get("content"):
            raise DataError(f"{self.path} is damaged: its columns are not as they were written")


def parse_header(data: bytes, trailer: Trailer, size_bytes: int, where: str) -> dict[str, Any]:
    """The header of a file, all of whose bytes it must account for.

    Args:
        data: The bytes before the trailer.
        trailer: Of the file.
        size_bytes: Of the file.
        where: What to call it.

    Raises:
        DataError: It is damaged, or the file is larger than its columns.
        NewerVersion: A newer version wrote it.
    """
    end = size_bytes - TRAILER_BYTES - trailer.header_bytes
    if end < 0 or hashlib.sha256(data).hexdigest() != trailer.digest:
        raise DataError(f"{where} is damaged: its header is not as it was written")
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise DataError(f"{where} is damaged: its header has too many lists")
    try:
        header = json.loads(data)
        versions.check(_FORMAT, header["format"], where)
        if not isinstance(header["columns"], dict):
            raise TypeError("columns")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, versions.NewerVersion):
            raise
        raise DataError(f"{where} is damaged: its header: {error!r:.200}") from error
    bound = sum(_max_bytes(name, about, where) for name, about in header["columns"].items())
    if end > bound:
        raise DataError(f"{where} is damaged: it has {end} bytes of columns; they need {bound}")
    return header


def _max_bytes(name: str, about: Any, where: str) -> int:
    """Bytes that a column takes, with the padding before it."""
    try:
        if "value" in about:
            return 0
        return _ALIGNED - 1 + _checked(about["count"], 2**62) * _item_bytes(about["type"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged: column {name}: {error!r:.200}") from error


def _item_bytes(kind: Any) -> int:
    if kind not in _TYPES:
        raise ValueError(f"type {kind!r:.20}")
    return np.dtype(f"<{kind}").itemsize


def _constant(value: Any) -> np.ndarray:
    if type(value) is not int:
        raise TypeError(f"value {value!r:.20}")
    return np.array(value, dtype=np.int64)


def _checked(value: Any, bound: int) -> int:
    if type(value) is not int or not 0 <= value <= bound:
        raise ValueError(f"{value!r:.20}, not 0 to {bound}")
    return value
