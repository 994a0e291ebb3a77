"""WebP: the size of its canvas, which libwebp allocates as it opens a file."""

import struct

from lightship.data.images.source import Source
from lightship.errors import DataError

_BYTES_PER_PIXEL = 20


def is_webp(data: bytes | memoryview) -> bool:
    """Whether a file begins as a WebP does."""
    return bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WEBP"


def read_webp(data: bytes | memoryview) -> Source:
    """The file as it is, and the size of its canvas.

    Raises:
        DataError: It has none.
    """
    kind, head = bytes(data[12:16]), bytes(data[:30]).ljust(30, b"\0")
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    else:
        raise DataError("a damaged WebP (no image)")
    return Source("WEBP", data, width, height, _BYTES_PER_PIXEL, orientation=None)
