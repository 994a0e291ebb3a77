"""Bytes to pixels: decodes an image as a person sees it, and fits it to a square."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

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


def decode(data: bytes, encoding: str) -> np.ndarray:
    """The pixels of a sample as a person sees it on a white page.

    EXIF orientation is applied; grey, 16-bit, palette, transparent (over white) and CMYK images
    become RGB; of an animation the first frame counts.

    Args:
        data: The sample's bytes.
        encoding: `Manifest.encoding`.

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
    if _suits_torchvision(data):
        try:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(tensor, ImageReadMode.RGB, apply_exif_orientation=True).numpy()
        except RuntimeError:
            pass  # Pillow knows better, or says why not
    return _decode_with_pillow(data).transpose(2, 0, 1)


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
    return pixels[:, top : top + size_px, left : left + size_px].numpy()


def scale_short_side(image: np.ndarray, size_px: int) -> torch.Tensor:
    """Scale so that the short side is `size_px`: [3, H, W] uint8, lying HWC in memory."""
    height, width = image.shape[1:]
    short = min(height, width)
    scaled = (size_px * height // short, size_px * width // short)
    in_rows = np.require(image.transpose(1, 2, 0), requirements=["C", "W"])
    pixels = torch.from_numpy(in_rows).permute(2, 0, 1)
    if scaled != (height, width):
        pixels = F.interpolate(pixels[None], size=scaled, mode="bilinear", antialias=True)[0]
    return pixels


def _suits_torchvision(data: bytes) -> bool:
    """Whether torchvision decodes these bytes as Pillow would; it is 1.2 to 4 times as fast.

    That is: JPEG with one or three channels, PNG with 8 bits of grey or RGB and no transparency.
    """
    if data[:2] == b"\xff\xd8":
        frame = _jpeg_frame(data)
        if frame is None:
            return False
        height, width, channels = frame
        return channels in (1, 3) and 0 < height * width <= MAX_PIXELS
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 33:
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        opaque = data.find(b"tRNS", 33, data.find(b"IDAT", 33)) < 0
        is_plain = data[24] == 8 and data[25] in (_PNG_GREY, _PNG_RGB)
        return is_plain and opaque and 0 < height * width <= MAX_PIXELS
    return False


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, channels) of a JPEG's frame header; None if there is none."""
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            return (
                (data[at + 5] << 8) | data[at + 6],
                (data[at + 7] << 8) | data[at + 8],
                data[at + 9],
            )
        at += 1 if marker == 0xFF else 2 + ((data[at + 2] << 8) | data[at + 3])
    return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
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
        raise DataError(f"no image ({len(data)} bytes that begin {data[:8]!r})") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them into
        reason = str(error) or type(error).__name__
        raise DataError(f"a damaged or unsupported image ({reason})") from error
