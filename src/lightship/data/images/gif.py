"""GIF: a file reduced to its first frame, before Pillow decodes it."""

import struct

from lightship.data.images.source import MAX_PARTS, Source
from lightship.errors import DataError

SIGNATURES = (b"GIF87a", b"GIF89a")
_IMAGE, _EXTENSION, _CONTROL = 0x2C, 0x21, 0xF9
_BYTES_PER_PIXEL = 8
_DAMAGED = "a damaged GIF"


def read_gif(data: bytes | memoryview) -> Source:
    """Find the first frame of a file that begins with one of SIGNATURES.

    Comments and applications' blocks before it are left out, and of several descriptions of the
    frame the last counts; what follows the frame, Pillow does not look at.

    Raises:
        DataError: There is no frame, or MAX_PARTS blocks lie before it.
    """
    try:
        return _read(memoryview(data))
    except (IndexError, struct.error) as error:
        raise DataError(f"{_DAMAGED} (it ends before its first frame)") from error


def _read(view: memoryview) -> Source:
    width, height, flags = struct.unpack_from("<HHB", view, 6)
    at = header_end = 13 + _table_bytes(flags)
    control, parts = b"", 0
    while view[at] == _EXTENSION:
        start, kind = at, view[at + 1]
        at += 2
        while view[at]:
            at += 1 + view[at]
            parts += 1
        at, parts = at + 1, parts + 1
        if parts > MAX_PARTS:
            raise DataError(f"{_DAMAGED} (more than {MAX_PARTS} blocks before its first frame)")
        if kind == _CONTROL:
            control = bytes(view[start:at])
    if view[at] != _IMAGE:
        raise DataError(f"{_DAMAGED} (no frame)")
    left, top, frame_width, frame_height = struct.unpack_from("<4H", view, at + 1)
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    kept = b"".join([view[:header_end], control, view[at:]])
    return Source("GIF", kept, width, height, _BYTES_PER_PIXEL)


def _table_bytes(flags: int) -> int:
    """Of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
