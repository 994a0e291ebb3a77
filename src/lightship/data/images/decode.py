"""Decode: the bytes of a sample to the RGB pixels that a viewer shows."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from lightship.data.images import (
    avif,
    bitmaps,
    gif,
    high_bit_depth,
    jpeg,
    memory,
    png,
    tiff,
    webp,
)
from lightship.data.images.bands import Box, by_bands
from lightship.data.images.formats import extension_of
from lightship.data.images.limits import DEFAULT_LIMITS, ImageLimits
from lightship.data.images.orientation import orientation_of, upright
from lightship.data.images.source import Source
from lightship.errors import DataError

Image.MAX_IMAGE_PIXELS = None  # ImageLimits are checked instead, and name their flags
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; errors do
_TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")
_MAX_REASON = 200
_READERS: dict[str, Callable[[bytes | memoryview], Source]] = {
    "png": png.read_png, "gif": gif.read_gif, "webp": webp.read_webp, "avif": avif.read_avif,
    "bmp": bitmaps.read_bmp, "pbm": bitmaps.read_portable, "pgm": bitmaps.read_portable,
    "ppm": bitmaps.read_portable,
}  # fmt: skip


def decode(
    data: bytes | memoryview,
    encoding: str,
    least_px: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    rows: int | None = None,
) -> np.ndarray:
    """The pixels of a sample as a viewer shows it on a white page.

    EXIF orientation is applied; grey, 16-bit, palette, transparent (over white) and CMYK images
    become RGB; of an animation the first frame counts. Waits while other threads decode images
    that together take more memory than `limits` allows.

    Args:
        data: The sample's bytes.
        encoding: `Manifest.encoding`.
        least_px: (height, width) that are enough: a large JPEG may come at a half, a quarter or an
            eighth of its size that is no smaller than this (12 megapixels for 448: in two thirds
            of the time, and there is less to scale).
        limits: What it may cost.
        rows: How many rows of the undiminished image, from the top, are needed: those below may be
            black (a photograph's lower part costs as much to decode as its share of the file).

    Returns:
        [H, W, 3] uint8 RGB, maybe a read-only view.

    Raises:
        DataError: Damaged, truncated, no image, or above a limit; does not name the sample.
    """
    if encoding != "image":
        shape = tuple(int(n) for n in encoding.removeprefix("raw:").split("x"))
        if shape[0] != 3:
            raise DataError(f"{encoding} has {shape[0]} channels, not 3")
        if len(data) != math.prod(shape):
            raise DataError(f"{len(data)} bytes where {encoding} has {math.prod(shape)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape).transpose(1, 2, 0)
    try:
        with memory.held():
            return _decode_image(data, least_px, limits, rows)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError("an image that takes more memory than there is") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them into
        reason = ascii(str(error) or type(error).__name__)[1:-1][:_MAX_REASON]
        raise DataError(f"a damaged or unsupported image ({reason})") from error


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG as `decode` gives it undiminished; None for anything else.

    Raises:
        DataError: A damaged JPEG.
    """
    header = jpeg.read_header(data)
    return header.shown_size if header is not None and header.height * header.width else None


def _decode_image(
    data: bytes | memoryview,
    least_px: tuple[int, int] | None,
    limits: ImageLimits,
    rows: int | None,
) -> np.ndarray:
    header = jpeg.read_header(data)
    if header is None:
        return _decode_with_pillow(_source(data, limits), limits)
    cost = jpeg.cost_of(data, header, least_px, limits)
    memory.take(cost.memory_bytes, limits.memory_bytes)
    if header.is_simple:
        with contextlib.suppress(ValueError):  # Pillow knows better, or says why not
            return jpeg.decode(data, header, least_px or (0, 0), cost.forced, rows)
    return _load(jpeg.for_pillow(data, header), cost.factor)


def _source(data: bytes | memoryview, limits: ImageLimits) -> Source:
    """What Pillow is to decode, of any format but JPEG."""
    extension = extension_of(data)
    return tiff.read_tiff(data, limits) if extension == "tif" else _READERS[extension](data)


def _decode_with_pillow(source: Source, limits: ImageLimits) -> np.ndarray:
    limits.check_size(source.width, source.height)
    memory.take(source.memory_bytes, limits.memory_bytes)
    return _load(source)


def _load(source: Source, factor: int = 1) -> np.ndarray:
    """[H, W, 3] uint8; a JPEG reduced by `factor`."""
    if source.kind == "AVIF":
        image = avif.load_avif(source.data)
        return upright(by_bands(image, lambda band, _: _rgb(band)), source.orientation or 1)
    file = io.BytesIO(source.data)
    image = Image.open(file, formats=(source.kind,))
    if image.width * image.height > source.width * source.height:
        raise DataError("a damaged image (its sizes differ)")
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    image.load()
    orientation = source.orientation
    if orientation is None:
        exif, xmp = (image.info.get(name) or b"" for name in ("exif", "xmp"))
        orientation = orientation_of(exif, xmp)
    return upright(_pixels(image, source, file), orientation)


def _pixels(image: Image.Image, source: Source, file: io.BytesIO) -> np.ndarray:
    """[H, W, 3] uint8 of a loaded image, over white."""
    is_grey = image.mode in high_bit_depth.GREY_MODES
    convert = high_bit_depth.grey(image) if is_grey else _rgb
    hole = _transparent_levels(source, is_grey)

    def convert_with_hole(band: Image.Image, _: Box) -> np.ndarray:
        pixels = convert(band)
        if hole is None:
            return pixels
        is_hole = np.asarray(band) == hole[0] if is_grey else (pixels == hole).all(2)
        return np.where(is_hole[:, :, None], np.uint8(255), pixels)

    pixels = by_bands(image, convert_with_hole)
    if source.kind == "TIFF" and not is_grey:
        return high_bit_depth.rgb(image, pixels, file)
    return pixels


def _transparent_levels(source: Source, is_grey: bool) -> np.ndarray | None:
    """Of a PNG's one transparent colour, as they are in Pillow's pixels."""
    if not (isinstance(source, png.Png) and source.transparent):
        return None
    levels = np.array(source.transparent)
    if is_grey:
        return levels
    # Pillow keeps the upper 8 bits of a 16-bit colour, and spreads fewer bits over 0 to 255.
    depth = source.bit_depth
    return levels >> 8 if depth == 16 else levels * (255 // (2**depth - 1))


def _rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 of an image or a part of one, over white."""
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    if image.mode == "F":
        raise DataError("floating-point pixels, whose white is unknown")
    if image.mode == "L":
        image = Image.merge("RGB", (image, image, image))  # half the time of convert
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
