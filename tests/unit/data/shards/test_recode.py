"""What becomes of one image in a shard: copied as it is, or scaled and compressed again."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from lightship.data.images import avif, gif, jpeg, png, tiff
from lightship.data.images.decode import decode
from lightship.data.images.formats import extension_of
from lightship.data.images.resize import fit_square
from lightship.data.shards.recode import recode
from lightship.errors import DataError
from tests.support.images import encoded, pixels_of

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF",
           "ppm": "PPM"}  # fmt: skip


def coded(kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("extension", FORMATS)
def test_an_image_is_copied_under_the_extension_of_its_bytes(extension: str) -> None:
    data = coded(FORMATS[extension])
    assert recode(data, "image", None, None) == (data, extension)
    assert recode(data, "image", 60, None) == (data, extension), "never scaled up"
    assert f".{extension}" in Image.registered_extensions()


def tiff_of(mark: bytes) -> bytes:
    """Grey pixels 8x2 in one of the forms of TIFF."""
    order, is_big = {b"I": "<", b"M": ">"}[mark[:1]], b"+" in mark
    long, count, value = ("Q", "Q", "I4x") if is_big else ("I", "H", "I")
    head = mark + (struct.pack(order + "HHQ", 8, 0, 32) if is_big else struct.pack(order + "I", 24))
    tags = {256: 8, 257: 2, 258: 8, 259: 1, 262: 1, 273: len(head), 277: 1, 278: 2, 279: 16}
    entries = (struct.pack(order + "HH" + long + value, tag, 4, 1, of) for tag, of in tags.items())
    table = struct.pack(order + count, len(tags)) + b"".join(entries) + bytes(8)
    return head + bytes(range(16)) + table


def avif_of(brand: bytes) -> bytes:
    data = coded("AVIF", **({"save_all": True, "append_images": [Image.new("RGB", (90, 60))]}
                            if brand == b"avis" else {}))  # fmt: skip
    return data[:8] + brand + data[12:]


SIGNED: dict[bytes, tuple[str, Callable[[], bytes]]] = {
    jpeg.START: ("jpg", lambda: coded("JPEG")),
    png.SIGNATURE: ("png", lambda: coded("PNG")),
    **{mark: ("gif", lambda mark=mark: mark + coded("GIF")[6:]) for mark in gif.SIGNATURES},
    **{mark: ("tif", lambda mark=mark: tiff_of(mark)) for mark in tiff.SIGNATURES},
    **{brand: ("avif", lambda brand=brand: avif_of(brand)) for brand in avif.BRANDS},
    b"WEBP": ("webp", lambda: coded("WEBP")),
    b"BM": ("bmp", lambda: coded("BMP")),
    b"P1": ("pbm", lambda: b"P1 8 2 " + b"01" * 8),
    b"P2": ("pgm", lambda: b"P2 8 2 255 " + b"7 " * 16),
    b"P3": ("ppm", lambda: b"P3 8 2 255 " + b"7 " * 48),
    b"P4": ("pbm", lambda: b"P4 8 2 ab"),
    b"P5": ("pgm", lambda: b"P5 8 2 255 " + bytes(16)),
    b"P6": ("ppm", lambda: b"P6 8 2 255 " + bytes(48)),
}


@pytest.mark.parametrize("signature", SIGNED)
def test_whatever_is_decoded_is_packed(signature: bytes) -> None:
    extension, make = SIGNED[signature]
    data = make()
    assert signature in data[:12]
    assert recode(data, "image", None, None) == (data, extension)
    if signature == b"MM\0+":  # Pillow 13 looks for its number in the wrong byte
        return
    height, width, _ = decode(data, "image").shape
    assert (height, width) in ((60, 90), (2, 8))
    smaller, kind = recode(data, "image", None, 90)
    assert (kind, decode(smaller, "image").shape) == ("jpg", (height, width, 3))


def test_other_bytes_are_no_image() -> None:
    for data in (b"<html>", b"\0\0\0\x20ftypmp42", b"RIFF\0\0\0\0WAVE", b"P9"):
        with pytest.raises(DataError, match="no image"):
            extension_of(data)


@pytest.mark.parametrize("extension", FORMATS)
def test_scaling_keeps_jpeg_and_turns_the_rest_into_png(extension: str) -> None:
    data = coded(FORMATS[extension])
    small, kind = recode(data, "image", 30, None)
    assert kind == ("jpg" if extension == "jpg" else "png")
    assert pixels_of(small).shape == (30, 45, 3)
    direct = fit_square(decode(data, "image"), 30)
    then = fit_square(decode(small, "image"), 30)
    if kind == "png":
        np.testing.assert_array_equal(then, direct)
    else:
        assert np.abs(then.astype(float) - direct).mean() < 20


def test_quality_makes_a_jpeg_of_everything() -> None:
    sizes = []
    for quality in (20, 90):
        for kind in ("JPEG", "PNG"):
            data, extension = recode(coded(kind), "image", None, quality)
            assert (extension, data[:2]) == ("jpg", b"\xff\xd8")
            sizes.append(len(data))
    assert max(sizes[:2]) < min(sizes[2:])
    raw = PIXELS[:32, :32].transpose(2, 0, 1).tobytes()
    assert recode(raw, "raw:3x32x32", None, 90)[1] == "jpg"


def test_raw_pixels_become_png_without_loss() -> None:
    raw = PIXELS[:32, :32].transpose(2, 0, 1).tobytes()
    data, extension = recode(raw, "raw:3x32x32", None, None)
    assert extension == "png"
    np.testing.assert_array_equal(pixels_of(data), PIXELS[:32, :32])


def test_a_turned_image_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data, _ = recode(coded("JPEG", exif=exif), "image", 30, None)
    assert pixels_of(data).shape == (45, 30, 3)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None


def test_an_image_too_long_for_a_jpeg_is_a_bad_image() -> None:
    tall = encoded(np.zeros((70_000, 1), dtype=np.uint8))
    with pytest.raises(DataError, match="1x70000 px; JPEG holds 65500"):
        recode(tall, "image", None, 90)
