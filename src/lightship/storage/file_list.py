"""The names of many files: one text and offsets, not an object a name."""

import io
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import numpy as np

_AT_ONCE = 2**14


@dataclass(frozen=True, eq=False, repr=False)
class FileList(Sequence[str]):
    """Names of files, immutable; ten million take their bytes and 90 MB, a list of str 0.6 GB more.

    Attributes:
        text: The names, UTF-8, each but the last followed by a zero byte.
        starts: [F + 1] integers: where each name begins in `text`, and where another would.
    """

    text: bytes | memoryview
    starts: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> "FileList":
        """Of names in any form, without a list of them all."""
        if isinstance(names, FileList):
            return names
        text, sizes, rest = bytearray(), [np.zeros(1, dtype=np.int64)], iter(names)
        while some := [name.encode("utf-8", "surrogatepass") for name in islice(rest, _AT_ONCE)]:
            text += b"\0".join([*some, b""])
            sizes.append(np.array([len(name) + 1 for name in some], dtype=np.int64))
        return cls(bytes(text[:-1]), np.cumsum(np.concatenate(sizes)))

    @classmethod
    def from_text(cls, text: bytes) -> "FileList":
        """From `text` alone.

        Raises:
            UnicodeDecodeError: It is no UTF-8.
        """
        if not text.isascii():
            text.decode()
        zeros = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == 0)
        return cls(text, np.concatenate([[0], zeros + 1, [len(text) + 1]]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        """A name, or several as a list."""
        if isinstance(place, slice):
            first, end, step = place.indices(len(self))
            if step != 1 or first >= end:
                return [self[i] for i in range(first, end, step)]
            names = self._between(first, end).split("\0")
            whole = len(names) == end - first  # else there are names with a zero byte
            return names if whole else [self[i] for i in range(first, end)]
        i = operator.index(place)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} files, and no number {i}")
        i %= len(self)
        return self._between(i, i + 1)

    def _between(self, first: int, end: int) -> str:
        """The names [first, end), a zero byte between each and the next."""
        text = self.text[int(self.starts[first]) : int(self.starts[end]) - 1]
        return bytes(text).decode("utf-8", "surrogatepass")

    def select(self, chosen: np.ndarray) -> "FileList":
        """The names whose entry of `chosen` ([F] bool) is true; neighbours share this text."""
        first, count = int(np.argmax(chosen)) if len(chosen) else 0, int(np.count_nonzero(chosen))
        if count == len(self):
            return self
        if chosen[first : first + count].all():
            starts = self.starts[first : first + count + 1].astype(np.int64)
            begin, end = int(starts[0]), int(starts[-1]) - 1
            return FileList(memoryview(self.text)[begin : max(begin, end)], starts - begin)
        text, sizes = io.BytesIO(), [np.zeros(1, dtype=np.int64)]
        for first in range(0, len(self), _AT_ONCE):
            starts = self.starts[first : first + _AT_ONCE + 1].astype(np.int64)
            size, some = np.diff(starts), chosen[first : first + _AT_ONCE]
            piece = bytes(self.text[starts[0] : starts[-1]]).ljust(starts[-1] - starts[0], b"\0")
            text.write(np.frombuffer(piece, dtype=np.uint8)[np.repeat(some, size)].data)
            sizes.append(size[some])
        text.truncate(text.tell() - 1)
        return FileList(text.getvalue(), np.cumsum(np.concatenate(sizes)))

    def is_whole(self) -> bool:
        """Whether the names are text, and lie in `text` one after the other, without a gap."""
        for first in range(0, len(self), _AT_ONCE):
            starts = self.starts[first : first + _AT_ONCE + 1].astype(np.int64)
            begin, end = int(starts[0]), int(starts[-1]) - 1
            if (np.diff(starts) < 1).any() or begin < 0 or end > len(self.text):
                return False
            piece = bytes(self.text[begin:end])
            zeros = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 0)
            if not np.array_equal(zeros, starts[1:-1] - 1 - begin):
                return False
            try:
                piece.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                return False
        return not len(self) or int(self.starts[0]) == 0

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FileList):
            return self.text == other.text and len(self) == len(other)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["FileList"], tuple[bytes, np.ndarray]]:
        return FileList, (bytes(self.text), self.starts)

    def __repr__(self) -> str:
        return f"FileList({self[:3]}, {len(self)} in all)"
