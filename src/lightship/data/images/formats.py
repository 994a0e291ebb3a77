"""Formats: which one a file is of, by its first bytes."""

from lightship.data.images import avif, gif, jpeg, png, tiff, webp
from lightship.errors import DataError

_SIGNATURES: dict[bytes | tuple[bytes, ...], str] = {
    jpeg.START: "jpg", png.SIGNATURE: "png", gif.SIGNATURES: "gif", tiff.SIGNATURES: "tif",
    b"BM": "bmp", (b"P1", b"P4"): "pbm", (b"P2", b"P5"): "pgm", (b"P3", b"P6"): "ppm",
}  # fmt: skip


def extension_of(data: bytes | memoryview) -> str:
    """The extension that an image's first bytes call for, whatever its file was called.

    Raises:
        DataError: They are those of no image that is read; does not name the sample.
    """
    head = bytes(data[:12])
    for signature, extension in _SIGNATURES.items():
        if head.startswith(signature):
            return extension
    if webp.is_webp(head):
        return "webp"
    if avif.is_avif(head):
        return "avif"
    raise DataError(f"no image ({len(data)} bytes that begin {head[:8]!r})")
