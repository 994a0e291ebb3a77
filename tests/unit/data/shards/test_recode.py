"""What becomes of one image in a shard: copied as it is, or scaled and compressed again."""

import io

import numpy as np
import pytest
from PIL import Image

from lightship.data.images.decode import decode
from lightship.data.images.resize import fit_square
from lightship.data.shards.recode import extension_of, recode
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


def test_avif_and_big_endian_tiff_are_known_and_other_bytes_are_not() -> None:
    assert extension_of(b"\0\0\0\x20ftypavif\0\0\0\0") == "avif"
    assert extension_of(b"MM\0*\0\0\0\x08") == "tif"
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
