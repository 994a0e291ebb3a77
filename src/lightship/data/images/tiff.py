"""TIFF: a file reduced to the directory of its first image and the tags that its pixels need."""

import re
import struct
from typing import NamedTuple

import numpy as np

from lightship.data.images import orientation
from lightship.data.images.limits import ImageLimits
from lightship.data.images.source import MAX_PARTS, Source
from lightship.errors import DataError

_BYTES_PER_PIXEL = 20
_WIDTH, _HEIGHT, _PACKING, _STRIP_ROWS = 256, 257, 259, 278
_OFFSETS, _SIZES, _TILE = (273, 324), (279, 325), (322, 323)
_XMP = 700
_JPEGS, _JPEG_SCAN = (6, 7), re.compile(rb"\xff\xda")
_NEEDED = {
    _WIDTH, _HEIGHT, 258, _PACKING, 262, 266, *_OFFSETS, 277, _STRIP_ROWS, *_SIZES, 281, 284, 292,
    293, 317, 320, *_TILE, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 532,
}  # fmt: skip
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
                16: 8, 17: 8, 18: 8}  # fmt: skip
_WHOLE_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
_OVERLAP = 2
"""Sizes of strips may add up to so many files: some writers count the last strip as whole."""


class _Form(NamedTuple):
    """How numbers are stored: classic TIFF, or BigTIFF."""

    order: str
    entries: str
    """How many there are in a directory."""
    long: str
    """Offsets, and counts of values."""
    first: int
    """Where the first directory's offset stands."""


_FORMS = {
    b"II*\0": _Form("<", "H", "I", 4), b"MM\0*": _Form(">", "H", "I", 4),
    b"II+\0": _Form("<", "Q", "Q", 8), b"MM\0+": _Form(">", "Q", "Q", 8),
}  # fmt: skip
SIGNATURES = tuple(_FORMS)


class _Entry(NamedTuple):
    raw: bytes
    kind: int
    value: memoryview


def read_tiff(data: bytes | memoryview, limits: ImageLimits) -> Source:
    """Find the first image of a file that begins with one of SIGNATURES.

    Raises:
        DataError: It is damaged, its parts overlap, or a tile or JPEG in it is too large.
    """
    view = memoryview(data)
    form = _FORMS[bytes(view[:4])]
    try:
        entries = _entries(view, form)
    except struct.error as error:
        raise DataError("a damaged TIFF (it ends before its directory does)") from error
    if sum(len(entries[tag].value) for tag in _NEEDED & entries.keys()) > len(view):
        raise DataError("a damaged TIFF (its tags overlap)")
    width, height = (_number(entries, tag, form) for tag in (_WIDTH, _HEIGHT))
    _check_parts(entries, form, len(view))
    part = _part_size(entries, form, width, height)
    limits.check_size(*part)
    if _number(entries, _PACKING, form, 1) in _JPEGS:
        scans = sum(1 for _ in _JPEG_SCAN.finditer(view))
        if scans > limits.max_scans(*part):
            raise limits.refuse_scans(*part)
    turned = orientation.valid(_number(entries, orientation.TAG, form, 0))
    if orientation.TAG not in entries and _XMP in entries:
        turned = orientation.orientation_of(b"", bytes(entries[_XMP].value))
    needed = [entries[tag].raw for tag in sorted(_NEEDED & entries.keys())]
    reduced = _with_directory(view, form, needed)
    return Source("TIFF", reduced, width, height, _BYTES_PER_PIXEL, turned, part[0] * part[1] * 8)


def _entries(view: memoryview, form: _Form) -> dict[int, _Entry]:
    """The tags of the first directory."""
    (start,) = struct.unpack_from(form.order + form.long, view, form.first)
    (count,) = struct.unpack_from(form.order + form.entries, view, start)
    if count > MAX_PARTS:
        raise DataError(f"a damaged TIFF ({count} tags, more than {MAX_PARTS})")
    head = struct.Struct(form.order + "HH" + form.long)
    place = struct.Struct(form.order + form.long)
    at, entries = start + struct.calcsize(form.order + form.entries), {}
    for _ in range(count):
        tag, kind, values = head.unpack_from(view, at)
        value_at, end = at + head.size, at + head.size + place.size
        size_bytes = values * _VALUE_BYTES.get(kind, 1)
        if size_bytes > place.size:
            (value_at,) = place.unpack_from(view, value_at)
        entries[tag] = _Entry(bytes(view[at:end]), kind, view[value_at : value_at + size_bytes])
        at = end
    return entries


def _numbers(entries: dict[int, _Entry], tag: int, form: _Form) -> np.ndarray:
    """[K] integers of a tag; none if it is missing.

    Raises:
        DataError: They are of another type, or cut.
    """
    if tag not in entries:
        return np.zeros(0, dtype=np.uint64)
    _, kind, value = entries[tag]
    if kind not in _WHOLE_NUMBERS or len(value) % _VALUE_BYTES[kind]:
        raise DataError(f"a damaged TIFF (tag {tag} is no number)")
    return np.frombuffer(value, dtype=form.order + _WHOLE_NUMBERS[kind])


def _number(entries: dict[int, _Entry], tag: int, form: _Form, default: int | None = None) -> int:
    numbers = _numbers(entries, tag, form)
    if not len(numbers):
        if default is None:
            raise DataError(f"a damaged TIFF (tag {tag} is missing)")
        return default
    return int(numbers[0])


def _check_parts(entries: dict[int, _Entry], form: _Form, file_bytes: int) -> None:
    """Raise DataError for strips or tiles that are too many, or that overlap."""
    for tag in _OFFSETS:
        if (count := len(_numbers(entries, tag, form))) > MAX_PARTS:
            raise DataError(f"a TIFF of {count} strips or tiles, more than {MAX_PARTS}")
    for tag in _SIZES:
        if _numbers(entries, tag, form).astype(np.float64).sum() > _OVERLAP * file_bytes + 2**16:
            raise DataError("a damaged TIFF (its strips or tiles overlap)")


def _part_size(entries: dict[int, _Entry], form: _Form, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a tile, or of a strip."""
    if entries.keys() & _TILE:
        tile_width, tile_height = (_number(entries, tag, form, 0) for tag in _TILE)
        return tile_width, tile_height
    return width, min(height, _number(entries, _STRIP_ROWS, form, height))


def _with_directory(view: memoryview, form: _Form, entries: list[bytes]) -> bytes:
    """The file with these entries as its only directory, at its end."""
    at = len(view) + len(view) % 2
    if form.long == "I" and at >= 2**32:
        raise DataError("a damaged TIFF (more than 4 GiB)")
    first = struct.pack(form.order + form.long, at)
    count = struct.pack(form.order + form.entries, len(entries))
    none = bytes(len(first))
    after = form.first + len(first)
    padding = bytes(len(view) % 2)
    return b"".join([view[: form.first], first, view[after:], padding, count, *entries, none])
