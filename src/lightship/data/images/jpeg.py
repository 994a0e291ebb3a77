"""JPEG: its header, and decoding by libjpeg-turbo, which can decode at a part of the size."""

from typing import NamedTuple

import numpy as np
import simplejpeg

from lightship.data.images.orientation import orientation_of, upright

_START = b"\xff\xd8"
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
_APP1 = 0xE1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_FACTORS = (2, 4, 8)


class Header(NamedTuple):
    """What a JPEG's headers say.

    Attributes:
        height: As stored.
        width: As stored.
        channels: Of the stored image.
        orientation: See `orientation_of`.
        is_sequential: Whether it is decoded row by row. Of any other (a progressive one) the
            decoder holds all coefficients in memory, at whatever size it decodes.
    """

    height: int
    width: int
    channels: int
    orientation: int
    is_sequential: bool

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
    """The header of a JPEG; None if `data` is none, or damaged."""
    if data[:2] != _START:
        return None
    at, end, exif, xmp = 2, len(data) - 9, b"", b""
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        length = 2 + ((data[at + 2] << 8) | data[at + 3])
        if marker in _FRAMES:
            height, width = (data[at + 5] << 8) | data[at + 6], (data[at + 7] << 8) | data[at + 8]
            orientation = orientation_of(exif, xmp) if exif or xmp else 1
            return Header(height, width, data[at + 9], orientation, marker in _SEQUENTIAL)
        if marker == _APP1:
            payload = bytes(data[at + 4 : at + length])
            if payload.startswith(_EXIF):
                exif = exif or payload
            elif payload.startswith(_XMP):
                xmp = xmp or payload
        at += 1 if marker == 0xFF else length
    return None


def reduction(height: int, width: int, max_pixels: int) -> int:
    """The least of 1, 2, 4 and 8 by which an image must be reduced to `max_pixels`; 0: none is."""
    sizes = ((factor, -(-height // factor) * -(-width // factor)) for factor in (1, *_FACTORS))
    return next((factor for factor, pixels in sizes if pixels <= max_pixels), 0)


def decode(
    data: bytes | memoryview, header: Header, least_px: tuple[int, int], factor: int
) -> np.ndarray:
    """[H, W, 3] uint8 RGB, upright.

    Args:
        data: The file.
        header: Its header; `is_simple`.
        least_px: (height, width) as shown that are enough; (0, 0): decode the whole size.
        factor: Reduce by at least this much, whatever `least_px` is.

    Raises:
        ValueError: libjpeg-turbo finds something wrong, though Pillow may still read it.
    """
    height, width = least_px if header.orientation < 5 else least_px[::-1]
    if factor > 1:
        height = min(height, header.height // factor) or 1
        width = min(width, header.width // factor) or 1
    pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
    return upright(pixels, header.orientation)
