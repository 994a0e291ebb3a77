"""Recode: what becomes of one sample's bytes in a shard: copied, or scaled and compressed again."""

import io
import tempfile

import numpy as np
from PIL import Image

from lightship.data.images import memory
from lightship.data.images.decode import decode
from lightship.data.images.formats import extension_of
from lightship.data.images.limits import DEFAULT_LIMITS, ImageLimits
from lightship.data.images.resize import OVERSAMPLING, scale_short_side
from lightship.errors import DataError

SCALED_JPEG_QUALITY = 90
_MAX_JPEG_PX = 65_500


@memory.held()
def recode(
    data: bytes,
    encoding: str,
    short_side_px: int | None,
    quality: int | None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[bytes, str]:
    """A sample as it is stored: bytes and extension.

    Without `quality` an image that is small enough is copied byte for byte; raw pixels, and scaled
    images that were no JPEG, become PNG, which loses nothing.

    Args:
        data: The sample's bytes.
        encoding: `Manifest.encoding`.
        short_side_px: Scale a larger image down to this shorter side, as `fit_square` would.
        quality: Make it a JPEG of this quality, 1 to 100.
        limits: What decoding an image may cost.

    Raises:
        DataError: It cannot be decoded (if it has to be), or is no image; does not name the sample.
    """
    if encoding == "image":
        extension = extension_of(data)
        if short_side_px is None and quality is None:
            return data, extension
    else:
        extension = "png"
    least_px = (OVERSAMPLING * short_side_px,) * 2 if short_side_px else None
    pixels = decode(data, encoding, least_px, limits)
    is_scaled = short_side_px is not None and min(pixels.shape[:2]) > short_side_px
    if encoding == "image" and not is_scaled and quality is None:
        return data, extension
    if is_scaled:
        assert short_side_px is not None
        pixels = scale_short_side(pixels, short_side_px)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if quality is None and extension != "jpg":
        png = io.BytesIO()
        image.save(png, "PNG")
        return png.getvalue(), "png"
    if max(image.size) > _MAX_JPEG_PX:
        raise DataError(f"{image.width}x{image.height} px; JPEG holds {_MAX_JPEG_PX} a side")
    # Into a real file, because only then does Pillow let other threads work meanwhile.
    with tempfile.TemporaryFile() as jpeg:
        image.save(jpeg, "JPEG", quality=quality or SCALED_JPEG_QUALITY)
        jpeg.seek(0)
        return jpeg.read(), "jpg"
