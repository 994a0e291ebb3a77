"""Orientation: how a stored image is turned before it is shown, by its EXIF or XMP metadata."""

import re

import numpy as np
from PIL import Image

_TAG = 0x112
_XMP_TAG = re.compile(rb'tiff:Orientation(="|>)([0-9])')


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """The EXIF orientation, 1 to 8, from an image's metadata as Pillow reads it.

    XMP counts where EXIF holds none. 1, which is upright, where neither does or both are damaged.

    Args:
        exif: The EXIF block, with or without its "Exif" header; empty if there is none.
        xmp: The XMP packet; empty if there is none.
    """
    table = Image.Exif()
    try:
        table.load(exif)
        found = table.get(_TAG)
    except Exception:  # Pillow's parser raises whatever damaged bytes lead it into
        found = None
    if found is None and (match := _XMP_TAG.search(xmp)):
        found = int(match[2])
    return _valid(found)


def orientation_of_image(image: Image.Image) -> int:
    """The same of an image that Pillow has loaded."""
    try:
        return _valid(image.getexif().get(_TAG))
    except Exception:
        return 1


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of `image` [H, W, ...] as it is shown: [W, H, ...] from orientation 5 on."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::down, ::across]


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
