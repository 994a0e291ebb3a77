"""Bands: a large image converted piece by piece, so that the copies in between stay small."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

_PIXELS = 2**20

Box = tuple[int, int, int, int]
"""(left, top, right, bottom)."""


def boxes(size: tuple[int, int]) -> Iterator[Box]:
    """Boxes of at most a megapixel that cover an image of (width, height)."""
    width, height = size
    across = min(width, _PIXELS)
    down = max(1, _PIXELS // max(1, across))
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def by_bands(image: Image.Image, convert: Callable[[Image.Image, Box], np.ndarray]) -> np.ndarray:
    """[H, W, 3] uint8 of a loaded image, from the same of each of its boxes."""
    if image.width * image.height <= _PIXELS:
        return convert(image, (0, 0, *image.size))
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for left, top, right, bottom in boxes(image.size):
        box = left, top, right, bottom
        pixels[top:bottom, left:right] = convert(image.crop(box), box)
    return pixels
