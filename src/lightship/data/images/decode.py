"""Decode: the bytes of a sample to the RGB pixels that a viewer shows."""

import contextlib
import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from lightship.config import DataConfig
from lightship.data.images import high_bit_depth, jpeg, png
from lightship.data.images.orientation import orientation_of_image, upright
from lightship.errors import DataError

Image.init()
# Of Pillow's formats those that only compute (none starts a program, as EPS does), if built in.
_FORMATS = tuple(
    {"JPEG", "PNG", "WEBP", "PPM", "BMP", "DIB", "GIF", "TIFF", "AVIF"} & set(Image.OPEN)
)
Image.MAX_IMAGE_PIXELS = None  # PixelLimit is checked instead, and names its flag
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; errors do
_TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")


class PixelLimit(NamedTuple):
    """The largest image that is decoded.

    Attributes:
        pixels: Width times height. Above it a JPEG that is to be scaled down is decoded at a half,
            a quarter or an eighth of its size; anything else is refused, undecoded.
        flag: The setting to name.
    """

    pixels: int = DataConfig.max_image_pixels
    flag: str = "--data.max_image_pixels"

    def refuse(self, width: int, height: int, why: str = "") -> DataError:
        """What to raise for an image of this size."""
        return DataError(
            f"{width}x{height} px{why} are {width * height} pixels, more than {self.flag} "
            f"{self.pixels}: raise it or remove the image"
        )


DEFAULT_LIMIT = PixelLimit()


def decode(
    data: bytes | memoryview,
    encoding: str,
    least_px: tuple[int, int] | None = None,
    limit: PixelLimit = DEFAULT_LIMIT,
) -> np.ndarray:
    """The pixels of a sample as a viewer shows it on a white page.

    EXIF orientation is applied; grey, 16-bit, palette, transparent (over white) and CMYK images
    become RGB; of an animation the first frame counts.

    Args:
        data: The sample's bytes.
        encoding: `Manifest.encoding`.
        least_px: (height, width) that are enough: a large JPEG may come at a half, a quarter or an
            eighth of its size that is no smaller than this (12 megapixels for 448: in two thirds
            of the time, and there is less to scale).
        limit: Bound of the size.

    Returns:
        [H, W, 3] uint8 RGB, maybe a read-only view.

    Raises:
        DataError: Damaged, truncated, no image, or above the limit; does not name the sample.
    """
    if encoding != "image":
        shape = tuple(int(n) for n in encoding.removeprefix("raw:").split("x"))
        if len(data) != np.prod(shape):
            raise DataError(f"{len(data)} bytes where {encoding} has {np.prod(shape)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape).transpose(1, 2, 0)
    header = jpeg.read_header(data)
    factor = 1 if header is None else _forced_reduction(header, least_px, limit)
    if header is not None and header.is_simple:
        with contextlib.suppress(ValueError):  # Pillow knows better, or says why not
            return jpeg.decode(data, header, least_px or (0, 0), factor)
    return _decode_with_pillow(data, factor, limit)


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG as `decode` gives it undiminished; None for anything else."""
    header = jpeg.read_header(data)
    return header.shown_size if header is not None and header.height * header.width else None


def _forced_reduction(
    header: jpeg.Header, least_px: tuple[int, int] | None, limit: PixelLimit
) -> int:
    """By how much a JPEG must be reduced to be within the limit."""
    factor = jpeg.reduction(header.height, header.width, limit.pixels)
    if factor == 1:
        return 1
    if not header.is_sequential:
        raise limit.refuse(header.width, header.height, " (progressive JPEG)")
    if factor == 0 or least_px is None:
        raise limit.refuse(header.width, header.height)
    return factor


def _decode_with_pillow(data: bytes | memoryview, factor: int, limit: PixelLimit) -> np.ndarray:
    """[H, W, 3] uint8; a JPEG reduced by `factor`."""
    found = png.read_png(data) if data[:8] == png.SIGNATURE else None
    try:
        source = io.BytesIO(found.data if found else data)
        image: Image.Image = Image.open(source, formats=("PNG",) if found else _FORMATS)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        if image.width * image.height > limit.pixels:
            raise limit.refuse(image.width, image.height)
        image.load()
        if found is not None:
            return upright(_png_pixels(image, found), found.orientation)
        orientation = orientation_of_image(image)
        return upright(high_bit_depth.rgb(image, _rgb(image), source), orientation)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError(f"no image ({len(data)} bytes that begin {bytes(data[:8])!r})") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them into
        reason = str(error) or type(error).__name__
        raise DataError(f"a damaged or unsupported image ({reason})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 of a loaded image, over white."""
    if image.mode in high_bit_depth.GREY_MODES:
        return np.repeat(high_bit_depth.grey(image)[:, :, None], 3, axis=2)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    if image.mode == "F":
        raise DataError("floating-point pixels, whose white is unknown")
    if image.mode == "L":
        image = Image.merge("RGB", (image, image, image))  # half the time of convert
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _png_pixels(image: Image.Image, found: png.Png) -> np.ndarray:
    """[H, W, 3] uint8: a PNG's transparent colour, of which Pillow knows only 8 bits, in white."""
    pixels = _rgb(image)
    if not found.transparent:
        return pixels
    levels = np.array(found.transparent)
    if image.mode in high_bit_depth.GREY_MODES:
        is_hole = np.asarray(image) == levels[0]
    else:
        # Pillow keeps the upper 8 bits of a 16-bit colour, and spreads fewer bits over 0 to 255.
        depth = found.bit_depth
        shown = levels >> 8 if depth == 16 else levels * (255 // (2**depth - 1))
        is_hole = (pixels == shown).all(2)
    return np.where(is_hole[:, :, None], np.uint8(255), pixels)
