"""Orientation: how a stored image is turned before it is shown, by its EXIF or XMP metadata."""

import re
import struct

import numpy as np

TAG = 0x112
_XMP_TAG = re.compile(rb'tiff:Orientation(="|>)([0-9])')
_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}
_ENTRY_BYTES = 12


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """The EXIF orientation, 1 to 8, from an image's metadata.

    XMP counts where EXIF holds none. 1, which is upright, where neither does or both are damaged.

    Args:
        exif: The EXIF block, with or without its "Exif" header; empty if there is none.
        xmp: The XMP packet; empty if there is none.
    """
    found = _orientation_of_exif(exif)
    if found is None and (match := _XMP_TAG.search(xmp)):
        found = int(match[2])
    return valid(found)


def _orientation_of_exif(exif: bytes) -> int | None:
    """Of the first directory alone: Pillow's parser reads all that its entries refer to."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = _ORDERS.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    end = min(start + 2 + _ENTRY_BYTES * count, len(exif))
    for at in range(start + 2, end - _ENTRY_BYTES + 1, _ENTRY_BYTES):
        tag, kind, length = struct.unpack_from(order + "HHI", exif, at)
        if tag == TAG and length == 1 and kind in _WHOLE_NUMBERS:
            (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, at + 8)
            return int(value)
    return None


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of `image` [H, W, ...] as it is shown: [W, H, ...] from orientation 5 on."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::down, ::across]


def valid(orientation: object) -> int:
    """`orientation`, or 1 if it is none."""
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
