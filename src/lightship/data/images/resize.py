"""Images as squares: an image fitted to one, a random part cut out, and statistics of many."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from lightship.data.images import memory, scaling
from lightship.data.images.decode import decode, image_size
from lightship.data.images.limits import DEFAULT_LIMITS, ImageLimits
from lightship.errors import DataError

OVERSAMPLING = 2
"""With so many times the pixels a side before scaling, an image loses nothing visible."""
_WIDE = 4  # longer than so many short sides, an image is cropped before it is scaled
_LOG_ASPECT = math.log(4 / 3)
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Resize(NamedTuple):
    """How images become squares: the one definition for training, evaluation, prediction, export.

    Attributes:
        interpolation: bilinear or bicubic, antialiased.
        crop: Side of the square as a fraction of the short side (timm's crop_pct).
    """

    interpolation: str = "bilinear"
    crop: float = 1.0

    def short_side_px(self, size_px: int) -> int:
        """What the short side is scaled to, for squares of `size_px`: as timm, rounded down."""
        return math.floor(size_px / self.crop + 1e-6)


DEFAULT_RESIZE = Resize()


@memory.held()
def decode_square(
    data: bytes | memoryview,
    encoding: str,
    size_px: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    resize: Resize = DEFAULT_RESIZE,
) -> np.ndarray:
    """The middle of an image as a square, [size_px, size_px, 3] uint8: `decode` + `fit_square`."""
    enough_px = OVERSAMPLING * resize.short_side_px(size_px)
    return fit_square(decode(data, encoding, (enough_px, enough_px), limits), size_px, resize)


@memory.held()
def decode_box(
    data: bytes | memoryview,
    encoding: str,
    size_px: int,
    draws: np.ndarray,
    min_area: float,
    limits: ImageLimits = DEFAULT_LIMITS,
    interpolation: str = DEFAULT_RESIZE.interpolation,
) -> np.ndarray:
    """A random part of an image as a square, [size_px, size_px, 3] uint8 (see `random_box`)."""
    size = image_size(data) if encoding == "image" else None
    if size is None:
        image = decode(data, encoding, limits=limits)
        height, width = image.shape[:2]
        return cut(image, random_box(height, width, draws, min_area), size_px, interpolation)
    height, width = size
    top, left, box_height, box_width = random_box(height, width, draws, min_area)
    enough_px = OVERSAMPLING * size_px
    least_px = -(-enough_px * height // box_height), -(-enough_px * width // box_width)
    image = decode(data, encoding, least_px, limits, rows=top + box_height)
    down, across = image.shape[0] / height, image.shape[1] / width
    box = (
        min(round(top * down), image.shape[0] - 1), min(round(left * across), image.shape[1] - 1),
        max(1, round(box_height * down)), max(1, round(box_width * across)),
    )  # fmt: skip
    return cut(image, box, size_px, interpolation)


def fit_square(image: np.ndarray, size_px: int, resize: Resize = DEFAULT_RESIZE) -> np.ndarray:
    """Scale the short side and cut out the middle square.

    The same sizes and offsets as torchvision's Resize(short_side_px) + CenterCrop(size_px).

    Args:
        image: [H, W, 3] uint8.
        size_px: Side of the result.
        resize: How; an image that need not be scaled or cropped comes back as it is.

    Returns:
        [size_px, size_px, 3] uint8.
    """
    short_px = resize.short_side_px(size_px)
    height, width = image.shape[:2]
    if height == width == short_px == size_px:
        return image
    if max(height, width) > _WIDE * min(height, width):
        return _middle_of_wide(image, size_px, short_px, resize.interpolation)
    pixels = scale_short_side(image, short_px, resize.interpolation)
    top, left = (round((side - size_px) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size_px, left : left + size_px]


def _middle_of_wide(
    image: np.ndarray, size_px: int, short_px: int, interpolation: str
) -> np.ndarray:
    """`fit_square` of a wide or tall image, scaling nothing that is not in the result.

    The scaled image would be up to as many times larger than the result as the image is wider than
    high: for 30000x1 pixels at 224, 4.5 GB.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    reach = 1 if interpolation == "bilinear" else 2
    spans = [
        _middle_span(side, side * short_px // short, size_px, reach) for side in (height, width)
    ]
    (top, bottom, y0, y1), (left, right, x0, x1) = spans
    part = np.ascontiguousarray(image[top:bottom, left:right])
    square = Image.fromarray(part).resize(
        (size_px, size_px), _PILLOW[interpolation], box=(x0, y0, x1, y1)
    )
    return np.asarray(square)


def _middle_span(side: int, scaled: int, size_px: int, reach: int) -> tuple[int, int, float, float]:
    """(first, end, from, to) along one side: the pixels needed, and what of them is scaled.

    The latter becomes `size_px` pixels and is as exact as the offset of whole scaled pixels makes
    it; the former are as many more as the filter reaches.
    """
    step = side / scaled
    start = round((scaled - size_px) / 2) * step
    margin = math.ceil(reach * max(1.0, step)) + 1
    first = max(0, math.floor(start) - margin)
    end = min(side, math.ceil(start + size_px * step) + margin)
    return first, end, start - first, min(start + size_px * step, side) - first


def scale_short_side(
    image: np.ndarray, size_px: int, interpolation: str = DEFAULT_RESIZE.interpolation
) -> np.ndarray:
    """Scale so that the short side is `size_px`: [H, W, 3] uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    return _scale(image, size_px * height // short, size_px * width // short, interpolation)


def random_box(
    height: int, width: int, draws: np.ndarray, min_area: float
) -> tuple[int, int, int, int]:
    """A random part of an image, as Szegedy et al. 2015 (arXiv:1409.4842) train on.

    The same distribution as torchvision's RandomResizedCrop: a share of the area from `min_area` to
    1, an aspect from 3:4 to 4:3 (log-uniform), ten tries to fit one in, else the middle.

    Args:
        height: Of the image.
        width: Of the image.
        draws: [10, 4] in [0, 1).
        min_area: Least share of the area.

    Returns:
        (top, left, height, width) in pixels.
    """
    for area, aspect, y, x in draws.tolist():
        area = height * width * (min_area + (1 - min_area) * area)
        ratio = math.exp((2 * aspect - 1) * _LOG_ASPECT)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(y * (height - box_height + 1)), int(x * (width - box_width + 1))
            return top, left, box_height, box_width
    limit = math.exp(_LOG_ASPECT)
    box_height, box_width = min(height, round(width * limit)), min(width, round(height * limit))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def cut(
    image: np.ndarray,
    box: tuple[int, int, int, int],
    size_px: int,
    interpolation: str = DEFAULT_RESIZE.interpolation,
) -> np.ndarray:
    """A box of an image scaled to a square.

    Args:
        image: [H, W, 3] uint8.
        box: (top, left, height, width) in pixels.
        size_px: Side of the result.
        interpolation: See `Resize`.

    Returns:
        [size_px, size_px, 3] uint8.
    """
    top, left, height, width = box
    part = image[top : top + height, left : left + width]
    return _scale(part, size_px, size_px, interpolation)


def _scale(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Scale an image [H, W, 3] uint8, antialiased."""
    image = _contiguous(image)
    if image.shape[:2] == (height, width):
        return image
    return scaling.scale(image, height, width, interpolation)


def _contiguous(image: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3], contiguous and writable, as the kernel needs it."""
    if image.strides[2] == 1 and image.strides[1] != 3:  # turned or mirrored
        copy = np.empty(image.shape, dtype=np.uint8)
        for channel in range(3):  # six times as fast as whole pixels
            copy[..., channel] = image[..., channel]
        return copy
    return np.require(image, requirements=["C", "W"])


def channel_statistics(parts: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0..1, of images [N, H, W, 3] uint8 in parts.

    Of whole-number histograms: exact, so the same on every machine and rank.

    Raises:
        DataError: There are no images.
    """
    histogram = np.zeros((3, 256), dtype=np.int64)
    for images in parts:
        histogram += [np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, -1, 0)]
    if not histogram.any():
        raise DataError("no image to take the mean of (--data.normalize auto) can be read")
    weight = histogram / histogram.sum(1, keepdims=True)
    level = np.arange(256) / 255
    mean = weight @ level
    std = np.sqrt(np.maximum(weight @ level**2 - mean**2, 0))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()
