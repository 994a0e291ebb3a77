"""Images of more than 8 bits a channel: which level is white, and their pixels in 8 bits."""

import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from lightship.data.images.bands import Box, boxes, by_bands
from lightship.errors import DataError

GREY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of deep grey images; deep colours it keeps in 8 bits."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _WHITE_IS_ZERO = 258, 262, 281, 0  # of TIFF
_WHITE_12, _WHITE_16 = 2**12 - 1, 2**16 - 1
_WHITES = {2**bits - 1 for bits in range(8, 16)}
_OTHER_ORDER = {"RGB;16L": "RGB;16B", "RGB;16B": "RGB;16L"}
_OTHER_ORDER["RGB;16N"] = "RGB;16B" if sys.byteorder == "little" else "RGB;16L"


def grey(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """What makes [H, W, 3] uint8 of a part of an image of GREY_MODES: its white becomes 255.

    Raises:
        DataError: It has levels above 16 bits.
    """
    highest = max(int(np.asarray(image.crop(box)).max()) for box in boxes(image.size))
    if highest > _WHITE_16:
        raise DataError(f"grey levels up to {highest}, whose white is unknown")
    tags = getattr(image, "tag_v2", {})
    white = _white_of_tiff(tags, highest) if tags else _WHITE_16
    is_negative = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def convert(band: Image.Image) -> np.ndarray:
        levels = np.asarray(band).clip(0, white).astype(np.uint32)
        levels = white - levels if is_negative else levels
        return np.repeat(_in_8_bits(levels, white)[:, :, None], 3, axis=2)

    return convert


def rgb(image: Image.Image, pixels: np.ndarray, source: io.BytesIO) -> np.ndarray:
    """[H, W, 3] uint8: as `pixels`, but all 12 bits of a TIFF that keeps 12 bits of RGB in 16.

    Args:
        image: As loaded.
        pixels: Of it, of which Pillow keeps the upper 8 bits.
        source: The file; Pillow gives the lower 8 bits where it is told the other order of bytes.
    """
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    if image.mode != "RGB" or bits != (16, 16, 16) or int(pixels.max()) > _WHITE_12 >> 8:
        return pixels
    source.seek(0)
    again = Image.open(source, formats=("TIFF",))
    assert isinstance(again, TiffImagePlugin.TiffImageFile)
    tiles = []
    for tile in again.tile:
        mode, *others = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if mode not in _OTHER_ORDER:
            return pixels  # stored in planes
        tiles.append(tile._replace(args=(_OTHER_ORDER[mode], *others)))
    again.tile = tiles
    again.load()

    def levels(lower: Image.Image, box: Box) -> np.ndarray:
        left, top, right, bottom = box
        return pixels[top:bottom, left:right].astype(np.uint32) << 8 | np.asarray(lower)

    highest = max(int(levels(again.crop(box), box).max()) for box in boxes(again.size))
    white = _white_of_tiff(again.tag_v2, highest)
    return by_bands(again, lambda lower, box: _in_8_bits(levels(lower, box), white))


def _white_of_tiff(tags: Mapping[int, Any], highest: int) -> int:
    """The level that is white: what the file states, else 12 bits where no level is above them.

    Cameras of microscopes and X-ray detectors store 12 bits in 16 and seldom state it. A true
    16-bit image whose levels are all below a sixteenth of white would look black.
    """
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    stated: Any = tags.get(_MAX_SAMPLE_VALUE)
    stated = stated[0] if isinstance(stated, tuple) and stated else stated
    if bits < 16:
        return int(2**bits - 1)
    if stated in _WHITES and highest <= stated:  # others are the highest level of this one image
        return int(stated)
    return _WHITE_12 if highest <= _WHITE_12 else _WHITE_16


def _in_8_bits(levels: np.ndarray, white: int) -> np.ndarray:
    return ((levels * 255 + white // 2) // white).astype(np.uint8)
