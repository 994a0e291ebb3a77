"""Images as squares: an image fitted to one, a random part cut out, and statistics of many."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from lightship.data.images.decode import DEFAULT_LIMIT, PixelLimit, decode, image_size
from lightship.errors import DataError

OVERSAMPLING = 2
"""With so many times the pixels a side before scaling, an image loses nothing visible."""
_WIDE = 4  # longer than so many short sides, an image is cropped before it is scaled
_LOG_ASPECT = math.log(4 / 3)


def decode_square(
    data: bytes | memoryview, encoding: str, size_px: int, limit: PixelLimit = DEFAULT_LIMIT
) -> np.ndarray:
    """The middle of an image as a square, [size_px, size_px, 3] uint8: `decode` + `fit_square`."""
    enough_px = OVERSAMPLING * size_px
    return fit_square(decode(data, encoding, (enough_px, enough_px), limit), size_px)


def decode_box(
    data: bytes | memoryview,
    encoding: str,
    size_px: int,
    draws: np.ndarray,
    min_area: float,
    limit: PixelLimit = DEFAULT_LIMIT,
) -> np.ndarray:
    """A random part of an image as a square, [size_px, size_px, 3] uint8 (see `random_box`)."""
    size = image_size(data) if encoding == "image" else None
    if size is None:
        image = decode(data, encoding, limit=limit)
        height, width = image.shape[:2]
        return cut(image, random_box(height, width, draws, min_area), size_px)
    height, width = size
    top, left, box_height, box_width = random_box(height, width, draws, min_area)
    enough_px = OVERSAMPLING * size_px
    least_px = -(-enough_px * height // box_height), -(-enough_px * width // box_width)
    image = decode(data, encoding, least_px, limit)
    down, across = image.shape[0] / height, image.shape[1] / width
    box = (
        min(round(top * down), image.shape[0] - 1), min(round(left * across), image.shape[1] - 1),
        max(1, round(box_height * down)), max(1, round(box_width * across)),
    )  # fmt: skip
    return cut(image, box, size_px)


def fit_square(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale the short side to `size_px` (bilinear, antialiased) and cut out the middle square.

    The same sizes and offsets as torchvision's Resize(size_px) + CenterCrop(size_px).

    Args:
        image: [H, W, 3] uint8.
        size_px: Side of the result; an image of that size comes back as it is.

    Returns:
        [size_px, size_px, 3] uint8.
    """
    if image.shape[:2] == (size_px, size_px):
        return image
    height, width = image.shape[:2]
    if max(height, width) > _WIDE * min(height, width):
        return _middle_of_wide(image, size_px)
    pixels = scale_short_side(image, size_px)
    top, left = (round((side - size_px) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size_px, left : left + size_px]


def _middle_of_wide(image: np.ndarray, size_px: int) -> np.ndarray:
    """`fit_square` of a wide or tall image, scaling nothing that is not in the result.

    The scaled image would be up to as many times larger than the result as the image is wider than
    high: for 30000x1 pixels at 224, 4.5 GB.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    spans = [_middle_span(side, short, size_px) for side in (height, width)]
    (top, bottom, y0, y1), (left, right, x0, x1) = spans
    part = np.ascontiguousarray(image[top:bottom, left:right])
    square = Image.fromarray(part).resize(
        (size_px, size_px), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)
    )
    return np.asarray(square)


def _middle_span(side: int, short: int, size_px: int) -> tuple[int, int, float, float]:
    """(first, end, from, to) along one side: the pixels needed, and what of them is scaled.

    The latter becomes `size_px` pixels and is as exact as the offset of whole scaled pixels makes
    it; the former are as many more as the filter reaches.
    """
    scaled = size_px * side // short
    step = side / scaled
    start = round((scaled - size_px) / 2) * step
    reach = math.ceil(step) + 1
    first = max(0, math.floor(start) - reach)
    end = min(side, math.ceil(start + size_px * step) + reach)
    return first, end, start - first, min(start + size_px * step, side) - first


def scale_short_side(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale so that the short side is `size_px`: [H, W, 3] uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    return _scale(image, size_px * height // short, size_px * width // short)


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


def cut(image: np.ndarray, box: tuple[int, int, int, int], size_px: int) -> np.ndarray:
    """A box of an image scaled to a square (bilinear, antialiased).

    Args:
        image: [H, W, 3] uint8.
        box: (top, left, height, width) in pixels.
        size_px: Side of the result.

    Returns:
        [size_px, size_px, 3] uint8.
    """
    top, left, height, width = box
    return _scale(image[top : top + height, left : left + width], size_px, size_px)


def _scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale an image [H, W, 3] uint8 (bilinear, antialiased).

    By the operator behind `F.interpolate`, which itself returns CHW: transposing that takes longer
    than scaling.
    """
    image = _contiguous(image)
    if image.shape[:2] == (height, width):
        return image
    out = torch.empty((1, height, width, 3), dtype=torch.uint8)
    torch.ops.aten._upsample_bilinear2d_aa.out(
        torch.from_numpy(image[None]).permute(0, 3, 1, 2),
        [height, width], False, None, None, out=out.permute(0, 3, 1, 2),
    )  # fmt: skip
    return out[0].numpy()


def _contiguous(image: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3], contiguous and writable, as torch needs it."""
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
