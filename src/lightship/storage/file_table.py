"""The files of a listing: their names as one text and a number each, not objects."""

import io
import logging
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from lightship.storage.file_list import FileList

logger = logging.getLogger(__name__)
_BLOCK, _SAMPLED = 2**13, 2**10
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, eq=False)
class FileTable(Mapping[str, int]):
    """Path -> bytes of the files below a root, sorted by path, immutable.

    Ten million take their names and 170 MB, a dict of str 2 GB more.

    Attributes:
        paths: Relative to the root, '/'-separated; empty if the root itself is the file.
        sizes: [F] int64 bytes.
        special: Sorted paths of pipes, sockets and devices, which are not in the table and must
            not be read.
    """

    paths: FileList
    sizes: np.ndarray
    special: tuple[str, ...] = ()

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> "FileTable":
        """Of path -> bytes."""
        table = FileTableBuilder()
        for path, size_bytes in sizes.items():
            table.add(path, size_bytes)
        return table.finish()

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __getitem__(self, path: str) -> int:
        i = bisect_left(self.paths, path)
        if i == len(self) or self.paths[i] != path:
            raise KeyError(path)
        return int(self.sizes[i])

    def mask(self, is_wanted: Callable[[str], object]) -> np.ndarray:
        """Whether each path is wanted, [F] bool."""
        return np.fromiter(map(is_wanted, self), bool, len(self))

    def select(self, chosen: np.ndarray) -> "FileTable":
        """The files whose entry of `chosen` ([F] bool) is true."""
        sizes = self.sizes if chosen.all() else self.sizes[chosen]
        return FileTable(self.paths.select(chosen), sizes)


class FileTableBuilder:
    """Makes a `FileTable` of files in any order, in little more memory than the table takes.

    Every 8,192 files become a sorted block; the blocks are merged stretch by stretch.

    Args:
        where: What is listed, named every 10 s in a log line with the number of files so far.
    """

    def __init__(self, where: str = "") -> None:
        self._where, self._next_s = where, time.monotonic() + _LOG_EVERY_S
        self._files: dict[str, int] = {}
        self._blocks: list[FileTable] = []
        self._special: set[str] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, path: str, size_bytes: int) -> None:
        """Add a file. Of a path that comes twice, the last size counts."""
        self._files[path] = size_bytes
        self._count += 1
        if len(self._files) == _BLOCK:
            self._end_block()

    def add_special(self, path: str) -> None:
        """Add a pipe, socket or device."""
        self._special.add(path)
        self._count += 1

    def finish(self) -> FileTable:
        """The table. This builder is not used any more."""
        self._end_block()
        blocks, out = self._blocks, _Columns()
        samples = sorted(path for block in blocks for path in block.paths[::_SAMPLED])
        ends = [*samples[:: _BLOCK // _SAMPLED][1:], None]
        places = [0] * len(blocks)
        firsts: list[str | None] = [block.paths[0] for block in blocks]
        for end in ends:
            files: dict[str, int] = {}
            for number, first in enumerate(firsts):
                if first is None or (end is not None and first >= end):
                    continue
                block, start = blocks[number], places[number]
                stop = len(block) if end is None else bisect_left(block.paths, end, start)
                sizes = block.sizes[start:stop].tolist()
                files.update(zip(block.paths[start:stop], sizes, strict=True))
                places[number] = stop
                firsts[number] = block.paths[stop] if stop < len(block) else None
                if stop == len(block):
                    blocks[number] = _EMPTY
            out.write(files)
        return out.table(tuple(sorted(self._special)))

    def _end_block(self) -> None:
        if self._files:
            out = _Columns()
            out.write(self._files)
            self._blocks.append(out.table())
            self._files = {}
        now_s = time.monotonic()
        if self._where and now_s >= self._next_s:
            self._next_s = now_s + _LOG_EVERY_S
            logger.info(f"listing {self._where}: {self._count:,} files so far")


class _Columns:
    """A table that is written from its first path to its last."""

    def __init__(self) -> None:
        self._text, self._starts, self._sizes = io.BytesIO(), array("q", [0]), array("q")

    def write(self, files: Mapping[str, int]) -> None:
        """Append files, all behind those before."""
        if not files:
            return
        paths = sorted(files)
        names = [path.encode("utf-8", "surrogatepass") for path in paths]
        self._text.write((b"\0" if self._sizes else b"") + b"\0".join(names))
        begin = self._starts.pop()
        self._starts.extend(accumulate((len(name) + 1 for name in names), initial=begin))
        self._sizes.extend(map(files.__getitem__, paths))

    def table(self, special: tuple[str, ...] = ()) -> FileTable:
        """What is written."""
        starts, sizes = (
            np.frombuffer(numbers, np.int64) if numbers else np.zeros(0, np.int64)
            for numbers in (self._starts, self._sizes)
        )
        return FileTable(FileList(self._text.getvalue(), starts), sizes, special)


_EMPTY = _Columns().table()
