"""Images of every format look as on a white page; squares and boxes are torchvision's."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from lightship.data.images import resize
from lightship.data.images.decode import decode
from lightship.data.images.resize import decode_square, fit_square
from lightship.errors import DataError

H, W = 20, 28


def picture(height: int = H, width: int = W) -> np.ndarray:
    """[H, W, 3] uint8: smooth, so that lossy formats stay near, and unlike its mirror images."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (
        x * 255 // (width - 1),
        y * 255 // (height - 1),
        255 - x * y * 255 // (width * height),
    )
    return np.stack(planes, axis=2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def assert_looks_like(data: bytes, rgb: np.ndarray, tolerance: float) -> None:
    """rgb: [H, W, 3]."""
    image = decode(data, "image")
    assert image.dtype == np.uint8
    assert image.shape == rgb.shape
    assert np.abs(image.astype(float) - rgb).max() <= tolerance


ALPHA = np.dstack([picture(), np.tile(np.arange(W) * 9, (H, 1)).astype(np.uint8)])
GREY = picture()[..., 0]
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
DEEP = np.minimum(GREY.astype(np.int64) * 257 + 100, 65535).astype(np.uint16)  # rounds to GREY
PALETTE = Image.fromarray(picture()).quantize(16)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))


def with_hole(image: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """The palette image with colour 3 transparent, and what is seen of it."""
    rgb = np.array(image.convert("RGB"))
    rgb[np.asarray(image) == 3] = 255
    return image, rgb


AWKWARD = {
    "rgb png": (saved(Image.fromarray(picture()), "PNG"), picture(), 0),
    "rgb bmp": (saved(Image.fromarray(picture()), "BMP"), picture(), 0),
    "rgb tiff": (saved(Image.fromarray(picture()), "TIFF"), picture(), 0),
    "lossless webp": (saved(Image.fromarray(picture()), "WEBP", lossless=True), picture(), 0),
    "webp alpha": (
        saved(Image.fromarray(ALPHA), "WEBP", lossless=True, exact=True),
        on_white(ALPHA),
        1,
    ),
    "jpeg": (saved(Image.fromarray(picture()), "JPEG", quality=100, subsampling=0), picture(), 6),
    "progressive jpeg": (
        saved(Image.fromarray(picture()), "JPEG", quality=100, subsampling=0, progressive=True),
        picture(),
        6,
    ),
    "grey jpeg": (saved(Image.fromarray(GREY), "JPEG", quality=100), GREY_RGB, 4),
    "cmyk jpeg": (
        saved(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=100),
        picture(),
        6,
    ),
    "grey png": (saved(Image.fromarray(GREY), "PNG"), GREY_RGB, 0),
    "grey and alpha png": (
        saved(Image.fromarray(np.dstack([GREY, ALPHA[..., 3]]), "LA"), "PNG"),
        on_white(np.dstack([GREY_RGB, ALPHA[..., 3]])),
        1,
    ),
    "16-bit grey png": (saved(Image.fromarray(DEEP), "PNG"), GREY_RGB, 0),
    "16-bit grey tiff": (saved(Image.fromarray(DEEP), "TIFF"), GREY_RGB, 0),
    "one-bit png": (
        saved(Image.fromarray(GREY > 127), "PNG"),
        np.where(GREY_RGB > 127, 255, 0),
        0,
    ),
    "palette png": (saved(PALETTE, "PNG"), PALETTE_RGB, 0),
    "palette gif": (saved(PALETTE, "GIF"), PALETTE_RGB, 0),
    "palette png with a hole": (
        saved(with_hole(PALETTE)[0], "PNG", transparency=3),
        with_hole(PALETTE)[1],
        0,
    ),
    "rgb png with a transparent colour": (
        saved(Image.fromarray(picture()), "PNG", transparency=tuple(picture()[0, 0].tolist())),
        np.where((picture() == picture()[0, 0]).all(2, keepdims=True), 255, picture()),
        0,
    ),
    "rgba png": (saved(Image.fromarray(ALPHA), "PNG"), on_white(ALPHA), 1),
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_an_image_is_what_a_person_sees_on_a_white_page(kind):
    assert_looks_like(*AWKWARD[kind])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options = {"lossless": True} if kind == "WEBP" else options
    upright = picture()
    # The stored image is such that undoing the orientation shows the upright one.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    assert_looks_like(saved(image, kind, exif=exif, **options), upright, 6)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 95])
def test_the_fast_path_gives_pillows_pixels(subsampling, quality):
    data = saved(Image.fromarray(picture()), "JPEG", quality=quality, subsampling=subsampling)
    np.testing.assert_array_equal(
        decode(data, "image"),
        np.asarray(Image.open(io.BytesIO(data))),
    )


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert_looks_like(data, np.tile(np.uint8([255, 0, 0]), (H, W, 1)), 0)


@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk jpeg", "rgb png", "rgba png",
                                  "lossless webp", "palette gif", "rgb bmp"])  # fmt: skip
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_truncated_image_is_refused(kind, share):
    data = AWKWARD[kind][0]
    with pytest.raises(DataError):
        decode(data[: int(len(data) * share)], "image")


@pytest.mark.parametrize(
    "data", [b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"hello", b"%!PS-Adobe-3.0 EPSF"]
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError):
        decode(data * 9, "image")


def test_decompression_bombs_are_refused_with_the_bound():
    png = bytearray(AWKWARD["rgb png"][0])
    png[16:24] = (14_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    jpeg = bytearray(AWKWARD["jpeg"][0])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = (14_000).to_bytes(2, "big") * 2
    for bomb in (png, jpeg):
        with pytest.raises(DataError, match=r"14000x14000 px.*--data\.max_image_pixels 178956970"):
            decode(bytes(bomb), "image")


def test_raw_pixels():
    raw = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    pixels = decode(raw.tobytes(), "raw:3x4x5")
    np.testing.assert_array_equal(pixels, raw.transpose(1, 2, 0))
    with pytest.raises(DataError, match=r"59 bytes where raw:3x4x5 has 60"):
        decode(raw.tobytes()[1:], "raw:3x4x5")
    for encoding in ("raw:1x4x15", "raw:4x3x5"):  # [H, W, 3] is what all others expect
        with pytest.raises(DataError, match=r"channels, not 3"):
            decode(raw.tobytes(), encoding)
    with pytest.raises(DataError, match=r"^0 bytes where raw:3x4294967296x4294967296 has \d{20}"):
        decode(b"", "raw:3x4294967296x4294967296")


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (9, 7), (32, 50), (33, 33)])
def test_fit_square_is_torchvisions_resize_and_centre_crop(height, width):
    image = picture(height, width)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float()
    peer = V.center_crop(V.resize(tensor, [32], antialias=True), [32, 32])
    ours = fit_square(image, 32)
    assert ours.shape == (32, 32, 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(float) - peer.permute(1, 2, 0).numpy()).max() <= 1


def test_fit_square_leaves_an_image_of_the_size_alone():
    image = picture(16, 16)
    np.testing.assert_array_equal(fit_square(image, 16), image)


def photograph(height: int, width: int, **options) -> bytes:
    """A JPEG with detail of all sizes, some of it as fine as pixels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 97 + y / 61), np.sin(x / 13) * np.cos(y / 17), np.sin((x + y) / 2.3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    image = np.stack([60 * waves[0] + 30 * w for w in waves], -1) + 128 + noise
    return saved(
        Image.fromarray(image.clip(0, 255).astype(np.uint8)), "JPEG", quality=92, **options
    )


def test_a_large_jpeg_decoded_at_a_part_of_its_size_looks_the_same() -> None:
    data = photograph(1100, 1500)
    whole, part = (
        decode(data, "image"),
        decode(data, "image", (448, 448)),
    )
    assert part.shape == (550, 750, 3)
    difference = decode_square(data, "image", 224).astype(int) - fit_square(whole, 224)
    assert np.abs(difference).mean() < 1
    assert np.abs(difference).max() < 16
    assert decode(data, "image", (600, 600)).shape == whole.shape, "or it would be too small"


@pytest.mark.parametrize("min_area", [0.08, 1.0])
def test_a_random_box_is_the_same_part_at_whatever_size_it_is_decoded(min_area: float) -> None:
    data, draws = photograph(1600, 2000), np.random.default_rng(1).random((10, 4))
    whole = decode(data, "image")
    box = resize.random_box(1600, 2000, draws, min_area)
    expected = resize.cut(whole, box, 64).astype(int)
    difference = resize.decode_box(data, "image", 64, draws, min_area) - expected
    assert np.abs(difference).mean() < 4, "its edges are rounded to larger pixels"
    elsewhere = resize.decode_box(data, "image", 64, 1 - draws, min_area) - expected
    assert min_area == 1 or np.abs(elsewhere).mean() > 20


def test_a_random_box_of_a_turned_photograph_is_of_the_upright_one() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    turned, draws = photograph(300, 400, exif=exif), np.random.default_rng(1).random((10, 4))
    upright = decode(turned, "image")
    assert upright.shape == (400, 300, 3)
    expected = resize.cut(upright, resize.random_box(400, 300, draws, 0.3), 64)
    np.testing.assert_array_equal(resize.decode_box(turned, "image", 64, draws, 0.3), expected)


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    """Area and shape of 4,000 boxes beside those of torchvision's RandomResizedCrop."""
    draws = np.random.default_rng(0).random((4000, 10, 4))
    ours = np.array([resize.random_box(375, 500, each, 0.08) for each in draws])
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    crop = RandomResizedCrop.get_params
    theirs = np.array([crop(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0]):
        levels = [np.quantile(measure(boxes), [0.1, 0.5, 0.9]) for boxes in (ours, theirs)]
        np.testing.assert_allclose(*levels, rtol=0.06, atol=4)


def test_exif_transpose_of_pillow_agrees_with_the_table_above():
    exif = Image.Exif()
    exif[0x112] = 6
    data = saved(Image.fromarray(np.ascontiguousarray(np.rot90(picture()))), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(upright), picture())
