"""Decoding: the RGB that a viewer shows, whatever the format, its metadata and its size."""

import io
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from lightship.data.images import decode, resize
from lightship.data.images.limits import ImageLimits
from lightship.data.images.png import SIGNATURE
from lightship.data.shards.recode import recode
from lightship.errors import DataError

H, W = 20, 28
Y, X = np.mgrid[0:H, 0:W]
RGB = np.stack([X * 255 // (W - 1), Y * 255 // (H - 1), 255 - X * Y * 255 // (W * H)], 2)
RGB = RGB.astype(np.uint8)
GREY = RGB[..., 0]
TURNED = 6


def seen(data: bytes) -> np.ndarray:
    """[H, W, 3] int."""
    return decode.decode(data, "image").astype(int)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2).astype(int)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, payload: bytes, crc_error: int = 0) -> bytes:
    crc = zlib.crc32(kind + payload) ^ crc_error
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", crc)


def with_chunk(png: bytes, added: bytes, before: bytes = b"IDAT") -> bytes:
    at = png.index(before) - 4
    return png[:at] + added + png[at:]


def png_of(depth: int, colour_type: int, rows: bytes, width: int, *chunks: bytes) -> bytes:
    """A PNG of one row."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" + rows))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


# ---- PNG: what lies beside the pixels --------------------------------------------------------

PNGS = {
    "rgb": Image.fromarray(RGB),
    "grey": Image.fromarray(GREY),
    "rgba": Image.fromarray(np.dstack([RGB, np.full((H, W), 255, np.uint8)])),
    "palette": Image.fromarray(RGB).quantize(16),
    "16-bit": Image.fromarray(GREY.astype(np.uint16) * 257),
}
LARGE = zlib.compress(bytes(2**22))
BESIDE = {
    "a colour profile of 4 MiB": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "a bad CRC in a time": chunk(b"tIME", bytes(7), crc_error=1),
    "a bad CRC in a profile": chunk(b"iCCP", b"profile\0\0" + LARGE, crc_error=1),
    "a bad CRC in a transparency": chunk(b"tRNS", bytes(6), crc_error=1),
    "a bad CRC in EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08", crc_error=1),
    "a text of 4 MiB": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "damaged EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "damaged ImageMagick EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + b"zz"),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", PNGS)
def test_what_lies_beside_the_pixels_of_a_png_never_makes_it_unreadable(kind, beside):
    plain = saved(PNGS[kind], "PNG")
    np.testing.assert_array_equal(seen(with_chunk(plain, BESIDE[beside])), seen(plain))


EXIF = Image.Exif()
EXIF[0x112] = TURNED
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
MAGICK = b"\nexif\n      26\n" + EXIF.tobytes().hex().encode() + b"\n"
TURNS = {
    "EXIF": (chunk(b"eXIf", EXIF.tobytes()[6:]), b"IDAT"),
    "EXIF after the pixels": (chunk(b"eXIf", EXIF.tobytes()[6:]), b"IEND"),
    "XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), b"IDAT"),
    "packed XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), b"IDAT"),
    "ImageMagick's EXIF": (
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(MAGICK)),
        b"IDAT",
    ),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", PNGS)
def test_a_png_is_turned_the_same_whatever_its_pixels_are(kind, turn):
    plain = saved(PNGS[kind], "PNG")
    turned = with_chunk(plain, *TURNS[turn])
    np.testing.assert_array_equal(seen(turned), np.rot90(seen(plain), -1))
    np.testing.assert_array_equal(seen(turned), seen_by_the_export_page(turned, kind))


def seen_by_the_export_page(data: bytes, kind: str = "rgb") -> np.ndarray:
    """What docs/export.md makes of an image (of 16-bit ones `convert` makes white)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if kind == "16-bit":
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
@pytest.mark.parametrize("by", ["EXIF", "XMP", "both"])
def test_every_format_is_turned_by_exif_or_else_by_xmp(kind, mode, by):
    if (kind, mode) in [("JPEG", "RGBA"), ("WEBP", "CMYK")] or (kind == "TIFF" and by != "EXIF"):
        return
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    plain = saved(Image.fromarray(RGB).convert(mode), kind, **options)
    if by != "XMP":
        options["exif"] = EXIF
    if by != "EXIF":
        options["xmp"] = XMP if by == "XMP" else XMP.replace(b"6", b"3")
    turned = saved(Image.fromarray(RGB).convert(mode), kind, **options)
    assert seen(turned).shape == (W, H, 3)
    np.testing.assert_array_equal(seen(turned), np.rot90(seen(plain), -1))
    np.testing.assert_array_equal(seen(turned), seen_by_the_export_page(turned))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_turned_photograph_is_decoded_at_a_part_of_its_size(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    image = Image.fromarray(RGB).resize((280, 200), Image.Resampling.BICUBIC)
    data = saved(image, "JPEG", quality=95, exif=exif)
    whole = decode.decode(data, "image")
    least = tuple(side // 2 for side in whole.shape[:2])
    part = decode.decode(data, "image", least)
    assert part.shape[:2] == least
    halves = whole.reshape(least[0], 2, least[1], 2, 3).mean((1, 3))
    assert np.abs(part - halves).max() < 8


SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "grey": None}


def detailed(height: int, width: int, sampling: str, **options: object) -> bytes:
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if sampling == "grey":
        return saved(image.convert("L"), "JPEG", **options)
    return saved(image, "JPEG", subsampling=SAMPLINGS[sampling], **options)


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"optimize": True}])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("least_px", [None, (200, 150), (120, 90), (60, 45), (30, 20)])
def test_the_upper_rows_of_a_jpeg_are_the_same_where_those_below_are_not_decoded(
    sampling, options, least_px
):
    height, width = 415, 301
    data = detailed(height, width, sampling, **options)
    whole = decode.decode(data, "image", least_px)
    scale = len(whole) / height
    for rows in (1, 15, 16, 17, 100, 128, 255, 300, height - 1, height):
        part = decode.decode(data, "image", least_px, rows=rows)
        needed = math.ceil(rows * scale) + 1
        assert part.shape == whole.shape
        assert (part[:needed] == whole[:needed]).all()
        lowest = min(len(whole), math.ceil(rows * scale) + 6)
        assert not part[lowest:].any()


def test_a_jpeg_that_cannot_be_decoded_in_part_is_decoded_whole():
    turned = Image.Exif()
    turned[0x112] = 3
    for options in ({"progressive": True}, {"exif": turned}):
        data = detailed(200, 150, "4:2:0", **options)
        assert (seen(data) == decode.decode(data, "image", rows=20)).all()
    trailing = detailed(200, 150, "4:2:0") + b"\0" * 20
    assert (seen(trailing) == decode.decode(trailing, "image", rows=20)).all()


def test_a_truncated_jpeg_is_refused_whichever_rows_are_needed():
    data = detailed(400, 300, "4:2:0")
    with pytest.raises(DataError, match="truncated"):
        decode.decode(data[: len(data) * 3 // 4], "image", rows=20)


def test_a_jpeg_whose_upper_part_is_damaged_has_the_pixels_of_the_whole_one():
    data = bytearray(detailed(400, 300, "4:2:0"))
    at = data.index(b"\xff\xda") + 400
    data[at : at + 8] = b"\x12\x34\x56\x78\x9a\xbc\xde\xf0"
    whole = decode.decode(bytes(data), "image")
    assert (decode.decode(bytes(data), "image", rows=200)[:200] == whole[:200]).all()


@pytest.mark.parametrize("min_area", [0.08, 0.35, 1.0])
def test_a_random_box_has_the_pixels_of_the_whole_image(min_area):
    for seed, size in enumerate([(375, 500), (500, 333), (1600, 1200), (64, 48)]):
        data = detailed(*size, "4:2:0")
        draws = np.random.default_rng(seed).random((10, 4))
        box = resize.decode_box(data, "image", 96, draws, min_area)
        whole = data + b"\0"  # behind the end marker: all rows are decoded
        assert (box == resize.decode_box(whole, "image", 96, draws, min_area)).all()


def test_a_part_of_the_size_is_the_least_that_is_enough():
    data = photograph(71, 50)
    assert decode.decode(data, "image", (16, 16)).shape == (19, 27, 3), "three eighths"


# ---- transparent colours and more than 8 bits ------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "row", "width", "hole", "expected"),
    [
        (1, b"\x60", 4, 0, [255, 255, 255, 255]),
        (1, b"\x60", 4, 1, [0, 255, 255, 0]),
        (2, b"\x1b", 4, 2, [0, 85, 255, 255]),
        (4, b"\x01\x28", 4, 2, [0, 17, 255, 136]),
        (8, b"\x00\x01\x02\x03", 4, 2, [0, 1, 255, 3]),
        (16, struct.pack(">4H", 0, 257, 514, 515), 4, 514, [0, 1, 255, 2]),
    ],
)
def test_the_transparent_level_of_a_grey_png_is_white(depth, row, width, hole, expected):
    data = png_of(depth, 0, row, width, chunk(b"tRNS", struct.pack(">H", hole)))
    assert seen(data)[0].tolist() == [[level] * 3 for level in expected]


def test_the_transparent_colour_of_a_16_bit_rgb_png_is_white():
    row = struct.pack(">6H", 0x0102, 0x0304, 0x0506, 0x0A00, 0x0B00, 0x0C00)
    data = png_of(16, 2, row, 2, chunk(b"tRNS", row[:6]))
    assert seen(data)[0].tolist() == [[255] * 3, [0x0A, 0x0B, 0x0C]]


def tiff(grey: np.ndarray, **tags: int) -> bytes:
    names = {"photometric": 262, "max_sample_value": 281}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[names[name]] = value
    data = saved(Image.fromarray(grey), "TIFF", tiffinfo=info)
    if "photometric" in tags:  # Pillow writes its own
        entry = struct.pack("<HHI", 262, 3, 1)
        at = data.index(entry) + 8
        data = data[:at] + struct.pack("<H", tags["photometric"]) + data[at + 2 :]
    return data


DEEP = GREY.astype(np.uint16) * 257


def test_zero_is_white_in_a_tiff_that_says_so():
    np.testing.assert_array_equal(seen(tiff(DEEP, photometric=0)), 255 - as_rgb(GREY))
    np.testing.assert_array_equal(seen(tiff(DEEP, photometric=1)), as_rgb(GREY))


@pytest.mark.parametrize("photometric", [0, 1])
def test_twelve_bits_in_a_16_bit_tiff_keep_all_their_levels(photometric):
    twelve = (GREY.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    looks = as_rgb(GREY) if photometric else 255 - as_rgb(GREY)
    assert np.abs(seen(tiff(twelve, photometric=photometric)) - looks).max() <= 1


def test_a_tiff_that_states_how_many_bits_it_uses_is_scaled_by_them():
    ten = (GREY.astype(np.uint32) * 1023 // 255).astype(np.uint16)
    assert np.abs(seen(tiff(ten, max_sample_value=1023)) - as_rgb(GREY)).max() <= 1
    highest_of_this_image = tiff(DEEP // 3, max_sample_value=int(DEEP.max() // 3))
    assert np.abs(seen(highest_of_this_image) - as_rgb(GREY // 3)).max() <= 1


def tiff_of(order: str, pixels: bytes, width: int, bits: int, channels: int, packing: int) -> bytes:
    """A TIFF of one row, of a depth that Pillow does not write."""
    kept = zlib.compress(pixels) if packing == 8 else pixels
    photometric = 2 if channels == 3 else 1
    tags = [(256, width), (257, 1), (258, bits), (259, packing), (262, photometric), (273, 14),
            (277, channels), (278, 1), (279, len(kept))]  # fmt: skip
    at = 14 + len(kept)
    entries = b""
    for tag, value in tags:
        count, value = (3, 8) if (tag, channels) == (258, 3) else (1, value)
        kind = "HHIHH" if tag in (258, 259, 262, 277) and count == 1 else "HHII"
        numbers = (
            (3, count, value, 0) if kind == "HHIHH" else (3 if count == 3 else 4, count, value)
        )
        entries += struct.pack(order + kind, tag, *numbers)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HI", 42, at) + struct.pack(order + "3H", *[bits] * 3)
    return head + kept + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_12_bits_a_sample():
    levels = [0, 1365, 2730, 4095]
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for a, b in zip(levels[::2], levels[1::2], strict=True)
    )
    assert seen(tiff_of("<", packed, 4, 12, 1, 1))[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("packing", [1, 8], ids=["plain", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_twelve_bits_in_a_16_bit_rgb_tiff_keep_all_their_levels(order, packing):
    levels = np.arange(0, 4096, 65).tolist()[:63]
    data = tiff_of(order, struct.pack(f"{order}63H", *levels), 21, 16, 3, packing)
    assert seen(data).ravel().tolist() == [(level * 255 + 2047) // 4095 for level in levels]
    bright = [level * 16 for level in levels]
    data = tiff_of(order, struct.pack(f"{order}63H", *bright), 21, 16, 3, packing)
    assert seen(data).ravel().tolist() == [level >> 8 for level in bright]


def test_levels_beyond_16_bits_are_refused():
    with pytest.raises(DataError, match="grey levels up to 70000"):
        decode.decode(saved(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "image")


# ---- damaged PNG -----------------------------------------------------------------------------


def test_a_png_with_any_byte_inverted_is_refused_or_has_its_pixels():
    whole = saved(Image.fromarray(RGB), "PNG")
    for at in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        try:
            pixels_of_damaged = seen(bytes(damaged))
        except DataError:
            continue
        np.testing.assert_array_equal(pixels_of_damaged, RGB)


def test_a_wrong_checksum_beside_whole_pixels_of_a_png_is_no_matter():
    whole = saved(Image.fromarray(RGB), "PNG")
    damaged = bytearray(whole)
    damaged[whole.index(b"IEND") - 5] ^= 1
    np.testing.assert_array_equal(seen(bytes(damaged)), RGB)


# ---- the bound of an image's size ------------------------------------------------------------


def photograph(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    image = Image.fromarray(RGB).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    return saved(image, "JPEG", quality=95, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_above_the_bound_is_read_reduced(mode):
    data = photograph(400, 240, mode)
    whole = resize.decode_square(data, "image", 20).astype(int)
    for bound, size in ((96_000, (240, 400)), (30_000, (120, 200)), (1_500, (30, 50))):
        limit = ImageLimits(bound)
        assert decode.decode(data, "image", (240, 400), limit).shape == (*size, 3)
        square = resize.decode_square(data, "image", 20, limit)
        assert np.abs(square - whole).mean() < 4
        box = resize.decode_box(data, "image", 20, np.zeros((10, 4)), 0.01, limit)
        assert box.shape == (20, 20, 3)


@pytest.mark.parametrize(
    ("data", "least"),
    [
        (photograph(400, 240), None),
        (photograph(400, 240, progressive=True), (20, 20)),
        (photograph(4000, 240), (20, 20)),
        (saved(Image.fromarray(RGB).resize((400, 240)), "PNG"), (20, 20)),
        (saved(Image.fromarray(RGB).resize((400, 240)), "WEBP"), (20, 20)),
        (saved(Image.fromarray(RGB).resize((400, 240)), "TIFF"), (20, 20)),
    ],
    ids=["jpeg as it is", "progressive jpeg", "even at an eighth", "png", "webp", "tiff"],
)
def test_an_image_above_the_bound_is_refused_by_the_name_of_the_flag(data, least):
    refused = r"\d+x240 px.* more than --data\.max_image_pixels 1400"
    with pytest.raises(DataError, match=refused):
        decode.decode(data, "image", least, ImageLimits(1_400))
    assert decode.decode(data, "image", least, ImageLimits(960_000)).ndim == 3


def test_an_image_above_pillows_own_bounds_is_no_matter_of_pillows(recwarn):
    blank = saved(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(DataError, match=r"200000000 pixels, more than --data\.max_image_pixels"):
        decode.decode(blank, "image")
    decode.decode(saved(Image.new("1", (9_500, 9_500)), "PNG"), "image")
    assert not recwarn


def test_pack_reads_a_jpeg_above_the_bound_that_it_scales_and_refuses_others():
    limit = ImageLimits(30_000, flags="--")
    small, kind = recode(photograph(400, 240), "image", 24, None, limit)
    assert (kind, Image.open(io.BytesIO(small)).size) == ("jpg", (40, 24))
    png = saved(Image.fromarray(RGB).resize((400, 240)), "PNG")
    for data, short_side, quality in ((png, 24, None), (photograph(400, 240), None, 80)):
        with pytest.raises(DataError, match="--max_image_pixels 30000"):
            recode(data, "image", short_side, quality, limit)


# ---- wide and tall images --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (997, 13), (13, 997), (601, 120), (9, 50)])
@pytest.mark.parametrize("size_px", [16, 31, 64])
def test_a_wide_image_is_cropped_before_it_is_scaled_and_looks_the_same(size, size_px):
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = resize.scale_short_side(image, size_px)
    top, left = (round((side - size_px) / 2) for side in whole.shape[:2])
    expected = whole[top : top + size_px, left : left + size_px].astype(int)
    assert np.abs(resize.fit_square(image, size_px) - expected).max() <= 1


def test_a_wide_image_takes_little_memory():
    image = np.zeros((1, 30_000, 3), dtype=np.uint8)
    tracemalloc.start()
    resize.fit_square(image, 224)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
