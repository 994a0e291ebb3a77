"""Bitmaps: BMP and the portable formats (PBM, PGM, PPM), some of which Pillow decodes in Python."""

import re
import struct

from lightship.data.images.source import Source
from lightship.errors import DataError

_BYTES_PER_PIXEL = 9
MAX_SLOW_PIXELS, MAX_SLOW_BYTES = 2**24, 2**24
"""Of a file that Pillow decodes in Python, byte by byte: seconds."""
_RUN_LENGTHS = (1, 2)
_HEADER = re.compile(
    rb"P([1-6])" + 2 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})(?=[\s#])"
    + rb"(?:(?:\s|#[^\r\n]*[\r\n])+(\d{1,10}))?"
)  # fmt: skip
_HEADER_BYTES = 4096
_FAST = {b"5": (b"255", b"65535"), b"6": (b"255",)}
"""Kind -> levels of white whose pixels are stored as Pillow keeps them."""


def read_bmp(data: bytes | memoryview) -> Source:
    """The size of a BMP.

    Raises:
        DataError: It has none, or is too large for its kind.
    """
    head = bytes(data[:34]).ljust(34, b"\0")
    (header_bytes,) = struct.unpack_from("<I", head, 14)
    if header_bytes == 12:
        (width, height), packing = struct.unpack_from("<HH", head, 18), 0
    else:
        width, height, packing = struct.unpack_from("<ii4xI", head, 18)
    width, height = abs(width), abs(height)
    if packing in _RUN_LENGTHS:
        _check_slow("a run-length encoded BMP", width, height, data)
    return Source("BMP", data, width, height, _BYTES_PER_PIXEL)


def read_portable(data: bytes | memoryview) -> Source:
    """The size of a PBM, PGM or PPM.

    Raises:
        DataError: It has none in its first 4,096 bytes, or is too large for its kind.
    """
    match = _HEADER.match(bytes(data[:_HEADER_BYTES]))
    if match is None:
        raise DataError("a damaged PBM, PGM or PPM (no size at its beginning)")
    kind, width, height, white = match.groups()
    size = int(width), int(height)
    if kind != b"4" and white not in _FAST.get(kind, ()):
        _check_slow("a PBM, PGM or PPM as text or of an uncommon depth", *size, data)
    return Source("PPM", data, *size, _BYTES_PER_PIXEL)


def _check_slow(what: str, width: int, height: int, data: bytes | memoryview) -> None:
    if width * height > MAX_SLOW_PIXELS or len(data) > MAX_SLOW_BYTES:
        raise DataError(
            f"{what} of {width}x{height} px and {len(data)} bytes; at most {MAX_SLOW_PIXELS} "
            f"pixels and {MAX_SLOW_BYTES} bytes of such are read: store it in another format"
        )
