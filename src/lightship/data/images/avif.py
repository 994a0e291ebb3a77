"""AVIF: by Pillow's decoder without its plugin, which reads all that EXIF's entries refer to."""

from PIL import Image

from lightship.data.images.orientation import valid
from lightship.data.images.source import Source
from lightship.errors import DataError

try:  # private, and not in every build of Pillow
    from PIL._avif import AvifDecoder
except ImportError:
    AvifDecoder = None

BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_BYTES_PER_PIXEL = 20


def is_avif(data: bytes | memoryview) -> bool:
    """Whether a file begins as an AVIF does."""
    return bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in BRANDS


def read_avif(data: bytes | memoryview) -> Source:
    """The size of its first image. Decodes nothing."""
    (width, height), _, _, _, _, orientation, _ = _open(data).get_info()
    return Source("AVIF", data, width, height, _BYTES_PER_PIXEL, valid(orientation))


def load_avif(data: bytes | memoryview) -> Image.Image:
    """Its first image."""
    decoder = _open(data)
    size, _, mode, *_ = decoder.get_info()
    pixels, *_ = decoder.get_frame(0)
    return Image.frombytes(mode, size, pixels)


def _open(data: bytes | memoryview) -> "AvifDecoder":
    if AvifDecoder is None:
        raise DataError("AVIF, which this Pillow cannot decode")
    return AvifDecoder(bytes(data), "auto", 1)  # one thread: images are decoded side by side
