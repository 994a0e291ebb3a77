"""JPEG: its header, and decoding by libjpeg-turbo, which can decode at a part of the size."""

import contextlib
import re
from typing import NamedTuple

import numpy as np
import simplejpeg

from lightship.data.images.limits import ImageLimits
from lightship.data.images.orientation import orientation_of, upright
from lightship.data.images.source import MAX_PARTS, Source
from lightship.errors import DataError

START = b"\xff\xd8"
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
_SCAN, _END = 0xDA, 0xD9
_ALONE = {0x01, *range(0xD0, 0xDA)}  # TEM, RST0 to RST7, SOI and EOI: no segment follows them
_APP1, _COMMENT = 0xE1, 0xFE
_BESIDE = {*range(_APP1, 0xEE), 0xEF, _COMMENT}  # APP0 and APP14 say what the colours are
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_FACTORS = (2, 4, 8)
_MARKER = re.compile(rb"\xff++(?:\x00\xff++)*+([^\x00\xff])")  # nothing is tried twice
_NEXT_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
_BYTES_PER_PIXEL, _COEFFICIENT_BYTES = 9, 2
_END_OF_IMAGE = b"\xff\xd9"
_EIGHTHS = (1, 2, 3, 4, 8)  # of its size, at which an image is decoded here
_MARGIN_ROWS = 4  # of the result: colours are interpolated from rows below, and callers round


class Header(NamedTuple):
    """What a JPEG's headers say.

    Attributes:
        height: As stored.
        width: As stored.
        channels: Of the stored image.
        orientation: See `orientation_of`.
        height_at: Where the height stands in the file, two bytes.
        is_sequential: Whether it is decoded row by row, in one scan. Of any other (a progressive
            one) the decoder holds all coefficients in memory, at whatever size it decodes.
        scan: Where the first scan begins.
        beside: (first byte, end) of each segment before it that is not needed for the pixels.
    """

    height: int
    width: int
    channels: int
    orientation: int
    height_at: int
    is_sequential: bool
    scan: int
    beside: list[tuple[int, int]]

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) after the orientation is applied."""
        size = self.height, self.width
        return size if self.orientation < 5 else size[::-1]

    @property
    def is_simple(self) -> bool:
        """Whether `decode` takes it: one or three channels."""
        return self.channels in (1, 3) and self.height * self.width > 0


def read_header(data: bytes | memoryview) -> Header | None:
    """The header of a JPEG; None if `data` is none.

    Raises:
        DataError: It has no image, or before it more than MAX_PARTS segments, or a marker without
            one: read as a segment it would hide another header from us, but not from the decoder.
    """
    if data[:2] != START:
        return None
    at, exif, xmp = 2, b"", b""
    beside: list[tuple[int, int]] = []
    frame: tuple[int, int, int, int, bool] | None = None
    for _ in range(MAX_PARTS):
        start = _after_marker(data, at)
        marker = data[start - 1]
        if marker in _ALONE:
            raise DataError(f"a damaged JPEG (marker FF{marker:02X} before its image)")
        end = start + (data[start] << 8 | data[start + 1])
        if marker == _SCAN and frame:
            height_at, height, width, channels, is_sequential = frame
            is_sequential &= data[start + 2 : start + 3] == bytes([channels])
            turned = orientation_of(exif, xmp) if exif or xmp else 1
            return Header(height, width, channels, turned, height_at, is_sequential, at, beside)
        if marker in _FRAMES and not frame and start + 8 <= len(data):
            height, width = (data[start + k] << 8 | data[start + k + 1] for k in (3, 5))
            frame = start + 3, height, width, data[start + 7], marker in _SEQUENTIAL
        if marker == _APP1:
            payload = bytes(data[start + 2 : end])
            if payload.startswith(_EXIF):
                exif = exif or payload
            elif payload.startswith(_XMP):
                xmp = xmp or payload
        if marker in _BESIDE:
            beside.append((at, end))
        elif start - at > 2:
            beside.append((at, start - 2))
        at = end
    raise DataError(f"a damaged JPEG (more than {MAX_PARTS} segments before its image)")


def _after_marker(data: bytes | memoryview, at: int) -> int:
    """Where the segment of the marker at `at` begins, which may stand behind fill bytes."""
    if at + 4 <= len(data) and data[at] == 0xFF and 0 < data[at + 1] < 0xFF:
        return at + 2
    match = _MARKER.match(data, at)
    start = match.end() if match else len(data)
    if start + 2 > len(data):
        raise DataError("a damaged JPEG (no image in it)")
    return start


def has_more_scans(data: bytes | memoryview, header: Header, max_scans: int) -> bool:
    """Whether the image has more scans than that; what follows it in the file is not looked at."""
    at, scans = header.scan, 0
    while scans <= max_scans:
        match = _NEXT_MARKER.search(data, at)
        if match is None or match[1][0] == _END or match.end() + 2 > len(data):
            return False
        scans += match[1][0] == _SCAN
        start = match.end()
        at = start + (data[start] << 8 | data[start + 1])
    return True


class Cost(NamedTuple):
    """How a JPEG is decoded within the limits.

    Attributes:
        forced: By how much it must be reduced at least: 1, 2, 4 or 8.
        factor: By how much it may be.
        memory_bytes: What that takes.
    """

    forced: int
    factor: int
    memory_bytes: int


def cost_of(
    data: bytes | memoryview, header: Header, least_px: tuple[int, int] | None, limits: ImageLimits
) -> Cost:
    """What decoding takes.

    Args:
        data: The file.
        header: Its header.
        least_px: (height, width) as shown that are enough; None: the whole size is needed.
        limits: What it may cost.

    Raises:
        DataError: It is above the limits.
    """
    height, width = header.height, header.width
    forced = factor = reduction(height, width, limits.pixels)
    if not header.is_sequential:
        if forced != 1:
            raise limits.refuse_size(width, height, " (progressive JPEG)")
        if has_more_scans(data, header, limits.max_scans(width, height)):
            raise limits.refuse_scans(width, height)
    if forced == 0 or (forced > 1 and least_px is None):
        raise limits.refuse_size(width, height)
    if least_px is not None and header.is_simple:
        least = least_px if header.orientation < 5 else least_px[::-1]
        for larger in _FACTORS:
            if -(-height // larger) >= least[0] and -(-width // larger) >= least[1]:
                factor = max(factor, larger)
    memory_bytes = -(-height // factor) * -(-width // factor) * _BYTES_PER_PIXEL
    if not header.is_sequential:
        memory_bytes += height * width * header.channels * _COEFFICIENT_BYTES
    return Cost(forced, factor, memory_bytes)


def for_pillow(data: bytes | memoryview, header: Header) -> Source:
    """The file without what lies beside its pixels.

    Raises:
        DataError: libjpeg-turbo finds another size in it than its header says.
    """
    size = judged = header.height, header.width
    with contextlib.suppress(ValueError):  # a kind that it does not know
        size = simplejpeg.decode_jpeg_header(data)[:2]
    if size != judged:
        raise DataError("a damaged JPEG (its sizes differ)")
    view, at, kept = memoryview(data), 0, []
    for start, end in header.beside:
        kept.append(view[at:start])
        at = end
    kept.append(view[at:])
    return Source(
        "JPEG", b"".join(kept), header.width, header.height, _BYTES_PER_PIXEL, header.orientation
    )


def reduction(height: int, width: int, max_pixels: int) -> int:
    """The least of 1, 2, 4 and 8 by which an image must be reduced to `max_pixels`; 0: none is."""
    sizes = ((factor, -(-height // factor) * -(-width // factor)) for factor in (1, *_FACTORS))
    return next((factor for factor, pixels in sizes if pixels <= max_pixels), 0)


def decode(
    data: bytes | memoryview,
    header: Header,
    least_px: tuple[int, int],
    forced: int,
    rows: int | None = None,
) -> np.ndarray:
    """[H, W, 3] uint8 RGB, upright.

    Args:
        data: The file.
        header: Its header; `is_simple`.
        least_px: (height, width) as shown that are enough; (0, 0): decode the whole size.
        forced: Reduce by at least this much, whatever `least_px` is.
        rows: How many rows as shown, from the top, are needed: those further below may be black,
            and errors in them may go unnoticed.

    Raises:
        ValueError: libjpeg-turbo finds something wrong, though Pillow may still read it.
    """
    height, width = least_px if header.orientation < 5 else least_px[::-1]
    if forced > 1:
        height = min(height, header.height // forced) or 1
        width = min(width, header.width // forced) or 1
    if rows is not None and header.orientation == 1:
        pixels = _decode_upper(data, header, (height, width), rows)
        if pixels is not None:
            return pixels
    # The decoder refuses, before it begins, an image that is larger than the place for it.
    image = np.empty(_shape(header, _eighths(header, (height, width))), dtype=np.uint8)
    pixels = simplejpeg.decode_jpeg(
        data, min_height=height, min_width=width, min_factor=2, buffer=image
    )
    if pixels.shape != image.shape:
        raise ValueError("its sizes differ")
    return upright(pixels, header.orientation)


def _decode_upper(
    data: bytes | memoryview, header: Header, least_px: tuple[int, int], rows: int
) -> np.ndarray | None:
    """`decode` of the upper `rows` of an upright image, black below; None if that is no gain.

    The decoder is shown a header with a smaller height. It warns of the data that it then finds
    behind the image, hence not strict. A file that was cut off lacks the end marker and is left to
    the decoding of all rows, which refuses it whichever rows are needed.
    """
    if not header.is_sequential or data[-2:] != _END_OF_IMAGE:
        return None
    height, eighths = header.height, _eighths(header, least_px)
    decoded_rows = rows + -(-_MARGIN_ROWS * 8 // eighths)
    if decoded_rows >= height:
        return None
    shortened = bytearray(data)
    shortened[header.height_at : header.height_at + 2] = decoded_rows.to_bytes(2, "big")
    shape = _shape(header, eighths)
    image, part_height = np.empty(shape, dtype=np.uint8), _scaled(decoded_rows, eighths)
    part = simplejpeg.decode_jpeg(
        shortened,
        min_height=part_height,
        min_width=shape[1],
        min_factor=2,
        buffer=image,
        strict=False,
    )
    if part.shape != (part_height, *shape[1:]):
        return None
    image[part_height:] = 0
    return image


def _eighths(header: Header, least_px: tuple[int, int]) -> int:
    """The least part of the size, in eighths of it, that is enough; (0, 0): the whole."""
    if not any(least_px):
        return 8
    height, width = header.height, header.width
    least = min(least_px[0], height), min(least_px[1], width)
    enough = (n for n in _EIGHTHS if _scaled(height, n) >= least[0])
    return next(n for n in enough if _scaled(width, n) >= least[1])


def _shape(header: Header, eighths: int) -> tuple[int, int, int]:
    return _scaled(header.height, eighths), _scaled(header.width, eighths), 3


def _scaled(side: int, eighths: int) -> int:
    """As libjpeg-turbo rounds it."""
    return -(-side * eighths // 8)
