"""PNG: a file reduced to what its pixels need, before Pillow decodes it.

What lies beside the pixels (colour profiles, texts, times) never makes an image unreadable then,
however large or damaged it is.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lightship.data.images.orientation import orientation_of
from lightship.data.images.source import Source
from lightship.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3
_TRANSPARENCY_BYTES = {_GREY: 2, _RGB: 6}
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}
_HEADER_END = 33
_METADATA_BYTES = _PIECE_BYTES = 2**20
_MAX_CHUNKS, _CHUNK_BYTES = 10_000, 512
"""More chunks than this, and one for so many bytes of the file, are refused."""
_BYTES_PER_PIXEL = 9
_XMP = b"XML:com.adobe.xmp\0"
_TEXTS = (b"tEXt", b"zTXt")
_RAW_EXIF = b"Raw profile type exif\0"  # ImageMagick's, as hexadecimal text


@dataclass(frozen=True)
class Png(Source):
    """What is needed of a PNG.

    Attributes:
        bit_depth: Of a channel.
        transparent: The one colour of a grey or RGB image that is transparent: one level a channel
            of `bit_depth` bits; empty if there is none.
    """

    bit_depth: int = 8
    transparent: tuple[int, ...] = ()


def read_png(data: bytes | memoryview) -> Png:
    """Find in a file that begins with SIGNATURE what its pixels need.

    Raises:
        DataError: Its pixels are damaged (Pillow compares no checksum of them).
    """
    view = memoryview(data)
    if len(view) < _HEADER_END or view[12:16] != b"IHDR":
        raise DataError("a damaged PNG (no header)")
    width, height, bit_depth, colour_type = struct.unpack_from(">IIBB", view, 16)
    kept, kept_from = [], 0
    is_suspect = False
    transparency = exif = b""
    xmp: bytes | None = None
    raw_exif: bytes | None = None
    for start, end, kind in _chunks(view):
        if kind[0] < ord("a"):  # critical
            is_suspect |= kind == b"IDAT" and not _is_intact(view, start, end)
            continue
        payload = view[start + 8 : end - 4]
        if kind == b"tRNS" and _is_intact(view, start, end):
            transparency = transparency or bytes(payload)
            if colour_type == _PALETTE and len(payload) <= 256:
                continue
        elif kind == b"eXIf" and _is_intact(view, start, end):
            exif = exif or bytes(payload)
        elif kind == b"iTXt" and xmp is None and payload[: len(_XMP)] == _XMP:
            xmp = _text(payload[len(_XMP) :])  # of the first alone: inflating many takes long
        elif kind in _TEXTS and raw_exif is None and payload[: len(_RAW_EXIF)] == _RAW_EXIF:
            packed = bytes(payload[len(_RAW_EXIF) :])
            raw_exif = _inflated(packed[1:]) if kind == b"zTXt" else packed
        kept.append(view[kept_from:start])
        kept_from = end
    row_bytes = 1 + width * bit_depth * _CHANNELS.get(colour_type, 1) // 8
    if is_suspect and not _inflates(view, 2 * height * (row_bytes + 1) + _PIECE_BYTES):
        raise DataError("a damaged PNG (the checksum of its pixels differs)")
    essential = b"".join([*kept, view[kept_from:]]) if kept else data
    if len(transparency) != _TRANSPARENCY_BYTES.get(colour_type):
        transparency = b""
    levels = (transparency[at : at + 2] for at in range(0, len(transparency), 2))
    exif = exif or _from_hexadecimal(raw_exif or b"")
    orientation = orientation_of(exif, xmp or b"") if exif or xmp else 1
    colour = tuple(int.from_bytes(level, "big") for level in levels)
    return Png(
        "PNG",
        essential,
        width,
        height,
        _BYTES_PER_PIXEL,
        orientation,
        bit_depth=bit_depth,
        transparent=colour,
        more_bytes=2 * row_bytes,
    )


def _chunks(view: memoryview) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, end, type) of each chunk that is there as a whole."""
    at, left = len(SIGNATURE), _MAX_CHUNKS + len(view) // _CHUNK_BYTES
    while at + 12 <= len(view):
        if not (left := left - 1):
            raise DataError(f"a damaged PNG (chunks of less than {_CHUNK_BYTES} bytes)")
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(view):
            return
        yield at, end, bytes(view[at + 4 : at + 8])
        at = end


def _is_intact(view: memoryview, start: int, end: int) -> bool:
    return zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")


def _inflates(view: memoryview, max_bytes: int) -> bool:
    """Whether the compressed pixels are whole by their own checksum, and at most so many."""
    stream = zlib.decompressobj()
    try:
        for start, end, kind in _chunks(view):
            rest: bytes | memoryview = view[start + 8 : end - 4] if kind == b"IDAT" else b""
            while rest and not stream.eof:
                max_bytes -= len(stream.decompress(rest, _PIECE_BYTES))
                rest = stream.unconsumed_tail
                if max_bytes < 0:
                    return False
    except zlib.error:
        return False
    return stream.eof


def _text(payload: memoryview) -> bytes:
    """The text of an iTXt chunk after its keyword."""
    is_packed = payload[:1] == b"\1"
    *_, text = bytes(payload[2:]).split(b"\0", 2)  # language, translated keyword
    return _inflated(text) if is_packed else text


def _inflated(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, _METADATA_BYTES)
    except zlib.error:
        return b""


def _from_hexadecimal(text: bytes) -> bytes:
    """What ImageMagick wrote as a name, a length, and hexadecimal digits in lines."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except ValueError:
        return b""
