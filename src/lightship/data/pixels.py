"""Bytes to pixels: decodes an image as a person sees it, and fits it to a square."""

import contextlib
import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from lightship.exits import DataError

MAX_PIXELS = 89_478_485
"""Larger images are refused undecoded: the bound from which Pillow warns of a bomb."""
Image.init()
# Of Pillow's formats those that only compute (none starts a program, as EPS does), if built in.
_FORMATS = tuple(
    {"JPEG", "PNG", "WEBP", "PPM", "BMP", "DIB", "GIF", "TIFF", "AVIF"} & set(Image.OPEN)
)
_TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG_GREY, _PNG_RGB = 0, 2
_EXIF_SEGMENT, _ORIENTATION_TAG = 0xE1, 0x112
_OVERSAMPLING = 2  # with so many pixels a side before scaling, an image loses nothing visible
_LOG_ASPECT = math.log(4 / 3)


def decode(
    data: bytes | memoryview, encoding: str, least_px: tuple[int, int] | None = None
) -> np.ndarray:
    """The pixels of a sample as a person sees it on a white page.

    EXIF orientation is applied; grey, 16-bit, palette, transparent (over white) and CMYK images
    become RGB; of an animation the first frame counts.

    Args:
        data: The sample's bytes.
        encoding: `Manifest.encoding`.
        least_px: (height, width) that are enough: a large JPEG may come at a half, a quarter or an
            eighth of its size that is no smaller than this (12 megapixels for 448: in two thirds
            of the time, and there is less to scale).

    Returns:
        [3, H, W] uint8 RGB. For encoding "image" a view of pixels that lie HWC in memory.

    Raises:
        DataError: Damaged, truncated, no image, or more than MAX_PIXELS; does not name the sample.
    """
    if encoding != "image":
        shape = tuple(int(n) for n in encoding.removeprefix("raw:").split("x"))
        if len(data) != np.prod(shape):
            raise DataError(f"{len(data)} bytes where {encoding} has {np.prod(shape)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    if upright_jpeg_size(data) is not None:
        return _decode_upright_jpeg(data, least_px or (0, 0))
    if _suits_torchvision(data):
        from torchvision.io import ImageReadMode, decode_image  # as slow to import as torch itself

        with contextlib.suppress(RuntimeError):
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(tensor, ImageReadMode.RGB, apply_exif_orientation=True).numpy()
    return _decode_with_pillow(data).transpose(2, 0, 1)


def decode_square(data: bytes | memoryview, encoding: str, size_px: int) -> np.ndarray:
    """The middle of an image as a square, [3, size_px, size_px] uint8: `decode` + `fit_square`."""
    enough_px = _OVERSAMPLING * size_px
    return fit_square(decode(data, encoding, (enough_px, enough_px)), size_px)


def decode_box(
    data: bytes | memoryview, encoding: str, size_px: int, draws: np.ndarray, min_area: float
) -> np.ndarray:
    """A random part of an image as a square, [3, size_px, size_px] uint8 (see `random_box`)."""
    size = upright_jpeg_size(data) if encoding == "image" else None
    if size is None:
        image = decode(data, encoding)
        height, width = image.shape[1:]
        return cut(image, random_box(height, width, draws, min_area), size_px)
    height, width = size
    top, left, box_height, box_width = random_box(height, width, draws, min_area)
    enough_px = _OVERSAMPLING * size_px
    least_px = -(-enough_px * height // box_height), -(-enough_px * width // box_width)
    image = _decode_upright_jpeg(data, least_px)
    down, across = image.shape[1] / height, image.shape[2] / width
    box = (
        round(top * down), round(left * across),
        max(1, round(box_height * down)), max(1, round(box_width * across)),
    )  # fmt: skip
    return cut(image, box, size_px)


def fit_square(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale the short side to `size_px` (bilinear, antialiased) and cut out the middle square.

    The same sizes and offsets as torchvision's Resize(size_px) + CenterCrop(size_px).

    Args:
        image: [3, H, W] uint8.
        size_px: Side of the result; an image of that size comes back as it is.

    Returns:
        [3, size_px, size_px] uint8.
    """
    if image.shape[1:] == (size_px, size_px):
        return image
    pixels = scale_short_side(image, size_px)
    top, left = (round((side - size_px) / 2) for side in pixels.shape[1:])
    return pixels[:, top : top + size_px, left : left + size_px]


def scale_short_side(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale so that the short side is `size_px`: [3, H, W] uint8, lying HWC in memory."""
    height, width = image.shape[1:]
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
        image: [3, H, W] uint8.
        box: (top, left, height, width) in pixels.
        size_px: Side of the result.

    Returns:
        [3, size_px, size_px] uint8.
    """
    top, left, height, width = box
    return _scale(image[:, top : top + height, left : left + width], size_px, size_px)


def _scale(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[3, H, W] uint8 scaled (bilinear, antialiased), lying HWC in memory.

    By the operator behind `F.interpolate`, which itself would lay the result CHW: to turn that
    takes longer than to scale.
    """
    in_rows = np.require(image.transpose(1, 2, 0), requirements=["C", "W"])
    if image.shape[1:] == (height, width):
        return in_rows.transpose(2, 0, 1)
    out = torch.empty((1, height, width, 3), dtype=torch.uint8)
    torch.ops.aten._upsample_bilinear2d_aa.out(
        torch.from_numpy(in_rows[None]).permute(0, 3, 1, 2),
        [height, width], False, None, None, out=out.permute(0, 3, 1, 2),
    )  # fmt: skip
    return out[0].numpy().transpose(2, 0, 1)


def upright_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG that libjpeg-turbo alone decodes as Pillow would.

    That is one with one or three channels, which EXIF does not turn. None for anything else.
    """
    frame = _jpeg_frame(data) if data[:2] == b"\xff\xd8" else None
    if frame is None:
        return None
    height, width, channels, orientation = frame
    is_plain = channels in (1, 3) and orientation == 1
    return (height, width) if is_plain and 0 < height * width <= MAX_PIXELS else None


def _suits_torchvision(data: bytes | memoryview) -> bool:
    """Whether torchvision decodes these bytes as Pillow would; it is 1.2 to 4 times as fast.

    That is: JPEG with one or three channels, PNG with 8 bits of grey or RGB and no transparency.
    """
    if data[:2] == b"\xff\xd8":
        frame = _jpeg_frame(data)
        if frame is None:
            return False
        height, width, channels, _ = frame
        return channels in (1, 3) and 0 < height * width <= MAX_PIXELS
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 33:
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        opaque = b"tRNS" not in bytes(data[33:]).partition(b"IDAT")[0]
        is_plain = data[24] == 8 and data[25] in (_PNG_GREY, _PNG_RGB)
        return is_plain and opaque and 0 < height * width <= MAX_PIXELS
    return False


def _jpeg_frame(data: bytes | memoryview) -> tuple[int, int, int, int] | None:
    """(height, width, channels, EXIF orientation) from a JPEG's headers; None if there are none."""
    at, end, orientation = 2, len(data) - 9, 1
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        length = 2 + ((data[at + 2] << 8) | data[at + 3])
        if marker in _JPEG_FRAMES:
            return (
                (data[at + 5] << 8) | data[at + 6],
                (data[at + 7] << 8) | data[at + 8],
                data[at + 9],
                orientation,
            )
        if marker == _EXIF_SEGMENT and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(bytes(data[at + 4 : at + length]))
        at += 1 if marker == 0xFF else length
    return None


def _orientation(exif: bytes) -> int:
    """As Pillow reads it; 0, which is none, where it cannot."""
    table = Image.Exif()
    try:
        table.load(exif)
    except Exception:  # whatever damaged bytes lead the parser into
        return 0
    return int(table.get(_ORIENTATION_TAG, 1))


def _decode_upright_jpeg(data: bytes | memoryview, least_px: tuple[int, int]) -> np.ndarray:
    """[3, H, W] uint8; see `decode`."""
    height, width = least_px
    with contextlib.suppress(ValueError):  # Pillow knows better, or says why not
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
        return pixels.transpose(2, 0, 1)
    return _decode_with_pillow(data).transpose(2, 0, 1)


def _decode_with_pillow(data: bytes | memoryview) -> np.ndarray:
    """[H, W, 3] uint8."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} px, more than the {MAX_PIXELS} allowed")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BIT:
            deep = np.asarray(image).astype(np.int64).clip(0, 65535)
            grey = ((deep + 128) // 257).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image)
        if image.mode == "F":
            raise DataError("floating-point pixels, whose white is unknown")
        return np.asarray(image.convert("RGB"))
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError(f"no image ({len(data)} bytes that begin {bytes(data[:8])!r})") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them into
        reason = str(error) or type(error).__name__
        raise DataError(f"a damaged or unsupported image ({reason})") from error


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0..1, of images [N, C, H, W] uint8.

    Of whole-number histograms: exact, so the same on every machine and rank.
    """
    histogram = np.stack([np.bincount(c.ravel(), minlength=256) for c in images.swapaxes(0, 1)])
    weight = histogram / histogram.sum(1, keepdims=True)
    level = np.arange(256) / 255
    mean = weight @ level
    std = np.sqrt(np.maximum(weight @ level**2 - mean**2, 0))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()
