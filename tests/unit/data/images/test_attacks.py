"""Small files made to exhaust memory or time: each is refused, or read within bounds.

Each is decoded in a child whose memory is bounded; a child that does not end is a failure.
"""

import io
import re
import struct
import threading
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from lightship.data.images import jpeg, memory, resize
from lightship.data.images.decode import decode
from lightship.data.images.limits import ImageLimits
from lightship.data.images.png import SIGNATURE
from lightship.errors import DataError
from tests.support.bounded_child import call_bounded, refusals

SIDE = 4000
PIXELS = SIDE * SIDE
MIB = 2**20


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blank(mode: str, kind: str, side: int = SIDE, **options: object) -> bytes:
    return saved(Image.new(mode, (side, side)), kind, **options)


def chunk(kind: bytes, payload: bytes, crc_error: int = 0) -> bytes:
    crc = zlib.crc32(kind + payload) ^ crc_error
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", crc)


def png(width: int, height: int, depth: int, colour_type: int, *chunks: bytes) -> bytes:
    """All zeros."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    row = bytes(1 + (width * depth * channels + 7) // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(row * height))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def packed_text() -> bytes:
    """A megabyte of EXIF that is damaged at its end."""
    return chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(MIB - 9))[:-9] + b"xxx"
    )


def png_of_bomb() -> bytes:
    """8x8 pixels of 2 GiB, whose checksum is wrong, so that they are inflated to look at theirs."""
    packer, zeros = zlib.compressobj(9), bytes(2**24)
    packed = b"".join([*(packer.compress(zeros) for _ in range(128)), packer.flush()])
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", packed, crc_error=1)
    return SIGNATURE + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def exif_bomb(order: str, entries: int = 65_535, size_bytes: int = 2**22) -> bytes:
    """A directory each of whose entries refers to all of it."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    table = b"".join(struct.pack(order + "HHII", i, 1, size_bytes, 8) for i in range(entries))
    head = mark + struct.pack(order + "IH", 8, entries)
    return head + table + bytes(size_bytes)


def tiff(pixels: bytes, width: int, height: int, more: dict[int, int], *extra: bytes) -> bytes:
    """Grey and deflated; `extra` entries are written as they are."""
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, **more}
    if 322 not in more:
        tags = {273: 8, 278: height, 279: len(pixels), **tags}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries = sorted([*entries, *extra], key=lambda entry: entry[:2][::-1])
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return head + pixels + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def tiff_of_tile(width: int, height: int) -> bytes:
    """An image of 16x16 pixels in a larger tile."""
    packed = zlib.compress(bytes(width * height))
    return tiff(packed, 16, 16, {322: width, 323: height, 324: 8, 325: len(packed)})


def tiff_of_strips(count: int, data: bytes) -> bytes:
    """Strips of one row that are all the same bytes."""
    at = 8 + len(data)
    lists = struct.pack(f"<{2 * count}I", *[8] * count, *[len(data)] * count)
    start = at + len(lists)
    tags = [(256, 1, 8), (257, 1, count), (258, 1, 8), (259, 1, 8), (262, 1, 1), (273, count, at),
            (277, 1, 1), (278, 1, 1), (279, count, at + 4 * count)]  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, *rest) for tag, *rest in tags)
    head = b"II*\0" + struct.pack("<I", start)
    return head + data + lists + struct.pack("<H", len(tags)) + table + bytes(4)


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def gif(*before: bytes, screen: tuple[int, int] = (8, 8), frames: int = 1) -> bytes:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.putpalette([i * 7 % 256 for i in range(768)])
    data = saved(image, "GIF", optimize=False)
    head, frame = data[:6] + struct.pack("<HH", *screen) + data[10:781], data[781:-1]
    return head + b"".join(before) + frame * frames + b";"


def webp_canvas(width: int, height: int) -> bytes:
    """A frame of 8x8 on a large canvas."""
    frame = saved(Image.new("RGB", (8, 8)), "WEBP")[12:]
    sides = [(side - 1).to_bytes(3, "little") for side in (width, height)]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"".join(sides)
    place = bytes(6) + (7).to_bytes(3, "little") * 2 + b"\1\0\0\0"
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    animation += b"ANMF" + struct.pack("<I", len(place + frame)) + place + frame
    body = b"WEBP" + canvas + animation
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int, body: bytes) -> bytes:
    """Of eight bits, run-length encoded."""
    head = struct.pack("<IiiHHIIIIII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    palette = bytes(i * 5 % 256 for i in range(1024))
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + head + palette + body


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG of fill bytes": (lambda: b"\xff\xd8" + b"\xff" * 8 * MIB, "no image in it"),
    "JPEG of empty segments": (
        lambda: b"\xff\xd8" + b"\xff\xe5\0\2" * 2 * MIB + blank("RGB", "JPEG", 8)[2:],
        "more than 65536 segments",
    ),
    "JPEG of 2,000 scans": (
        lambda: scans(700, 2000),
        "700x700 px in more than 1095 scans.*--data.max_scan_pixels 536870912",
    ),
    "JPEG of 200,000 scans of 8x8": (lambda: scans(8, 200_000), "max_scan_pixels"),
    "PNG of tiny chunks": (
        lambda: png(8, 8, 8, 2, chunk(b"tEXt", b"") * 700_000),
        "chunks of less than 512",
    ),
    "PNG of 2 GiB in 8x8": (png_of_bomb, "checksum of its pixels"),
    "GIF of tiny comments": (
        lambda: gif(b"!\xfe" + b"\1a" * 4 * MIB + b"\0"),
        "more than 65536 blocks",
    ),
    "GIF of a large screen": (lambda: gif(screen=(65_535, 65_535)), "max_image_pixels"),
    "WebP of a large canvas": (lambda: webp_canvas(16_384, 16_384), "max_image_pixels"),
    "TIFF of a large tile": (lambda: tiff_of_tile(2**15, 2**14), "32768x16384 px.*max_image"),
    "TIFF whose strips overlap": (
        lambda: tiff_of_strips(60_000, b"\x78\x9c" + b"\0\0\0\xff\xff" * 400_000),
        "strips or tiles overlap",
    ),
    "TIFF of many strips": (lambda: tiff_of_strips(70_000, b""), "70000 strips or tiles"),
    "TIFF whose tags overlap": (
        lambda: tiff(
            zlib.compress(bytes(256)), 16, 16, {},
            *[struct.pack("<HHII", tag, 1, 2 * MIB, 8) for tag in (320, 347, 529, 530, 532)],
        ) + bytes(3 * MIB),
        "tags overlap",
    ),
    "BMP of runs in one row": (lambda: bmp(178_000_000, 1, b"\1\0\0\0"), "run-length"),
    "BMP of tiny runs": (lambda: bmp(4096, 4095, b"\1\0" * 9 * MIB), "run-length"),
    "PPM of a comment": (lambda: b"P6\n#" + b"a" * 8 * MIB + b"\n8 8 255\n", "no size"),
    "PGM of an uncommon depth": (lambda: b"P5 4097 4097 99\n" + bytes(4097**2), "uncommon depth"),
    "PPM as text": (lambda: b"P3 4000 4000 255\n" + b"0 " * 48_000_000, "as text"),
}  # fmt: skip


def decode_image(data: bytes) -> tuple[int, ...]:
    return decode(data, "image").shape


def test_small_files_that_cost_much_are_refused() -> None:
    files = {name: (make(),) for name, (make, _) in REFUSED.items()}
    said = refusals(decode_image, files, max_mib=60, max_s=60)
    for name, (_, expected) in REFUSED.items():
        assert re.search(expected, said[name]), f"{name}: {said[name]}"


READ: dict[str, Callable[[], bytes]] = {
    "PNG with EXIF of 65,535 tags": lambda: png(8, 8, 8, 2, chunk(b"eXIf", exif_bomb(">"))),
    "PNG of many packed texts": lambda: png(8, 8, 8, 2, *[packed_text()] * 8000),
    "JPEG of fill bytes": lambda: b"\xff\xd8" + b"\xff" * 8 * MIB + blank("CMYK", "JPEG", 8)[2:],
    "JPEG of comments": lambda: (
        b"\xff\xd8" + b"\xff\xfe\0\3a" * 60_000 + blank("CMYK", "JPEG", 8)[2:]
    ),
    "GIF of 20,000 frames": lambda: gif(frames=20_000),
    "TIFF of 60,000 tags": lambda: (
        tiff(
            zlib.compress(bytes(64)), 8, 8, {},
            *[struct.pack("<HHII", 1000 + tag, 1, 2 * MIB, 8) for tag in range(60_000)],
        ) + bytes(3 * MIB)
    ),
    "TIFF with a directory of 60,000 tags below it": lambda: (
        tiff(zlib.compress(bytes(64)), 8, 8, {34_665: 200}) + exif_bomb("<")
    ),
}  # fmt: skip


def test_what_lies_beside_the_pixels_costs_nothing() -> None:
    for name, make in READ.items():
        outcome = call_bounded(decode_image, make(), max_mib=60, max_s=60)
        assert outcome.result == (8, 8, 3), (name, outcome)


def jpeg_behind(marker: int, shown: bytes, hidden: bytes) -> bytes:
    """A JPEG, and before it another one in what looks like the segment of a marker.

    The decoder knows that no segment follows such a marker: it reads the hidden header.
    """
    length = 0xFFD0  # to the decoder another such marker
    inside = hidden[2:].ljust(length - 2, b"\0")
    return b"\xff\xd8\xff" + bytes([marker]) + struct.pack(">H", length) + inside + shown[2:]


@pytest.mark.parametrize("marker", [0x01, *range(0xD0, 0xDA)])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_has_no_second_header_for_the_decoder(marker: int, mode: str) -> None:
    hidden = blank("RGB", "JPEG", 800, optimize=True)
    data = jpeg_behind(marker, blank(mode, "JPEG", 8), hidden)
    with pytest.raises(DataError, match=f"damaged JPEG .marker FF{marker:02X} before its image"):
        decode(data, "image", limits=ImageLimits(pixels=1000))


def test_no_jpeg_is_decoded_that_is_larger_than_its_header_said() -> None:
    data = blank("RGB", "JPEG", 64, progressive=True)
    header = jpeg.read_header(data)
    assert header is not None
    assert jpeg.decode(data, header, (0, 0), 1).shape == (64, 64, 3)
    for judged in (header._replace(height=32), header._replace(width=63)):
        with pytest.raises(ValueError, match="buffer is too small"):
            jpeg.decode(data, judged, (0, 0), 1)
        with pytest.raises(DataError, match="its sizes differ"):
            jpeg.for_pillow(data, judged)
    with pytest.raises(ValueError, match="its sizes differ"):
        jpeg.decode(data, header._replace(height=65), (0, 0), 1)


# ---- memory ----------------------------------------------------------------------------------

COSTLY: dict[str, Callable[[], bytes]] = {
    "png 1": lambda: png(SIDE, SIDE, 1, 0),
    "png palette": lambda: png(
        SIDE, SIDE, 8, 3, chunk(b"PLTE", bytes(range(9))), chunk(b"tRNS", b"\0\x80")
    ),
    "png 16 with a colour": lambda: png(SIDE, SIDE, 16, 2, chunk(b"tRNS", bytes(6))),
    "png la 16": lambda: png(SIDE, SIDE, 16, 4),
    "png rgba 16": lambda: png(SIDE, SIDE, 16, 6),
    "png of one row": lambda: png(PIXELS, 1, 8, 6),
    "jpeg": lambda: blank("RGB", "JPEG"),
    "progressive jpeg": lambda: blank("RGB", "JPEG", progressive=True, subsampling=0),
    "cmyk jpeg": lambda: blank("CMYK", "JPEG", progressive=True),
    "webp": lambda: blank("RGB", "WEBP", method=0),
    "webp alpha": lambda: blank("RGBA", "WEBP", lossless=True, method=0),
    "webp canvas": lambda: webp_canvas(SIDE, SIDE),
    "gif": lambda: gif(screen=(SIDE, SIDE)),
    "tiff rgba": lambda: blank("RGBA", "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": lambda: blank("RGB", "TIFF", compression="jpeg"),
    "tiff tile": lambda: tiff_of_tile(SIDE, SIDE),
    "bmp": lambda: bmp(SIDE, SIDE, b"\1\0\0\0" * SIDE),
    "avif": lambda: blank("RGB", "AVIF", speed=10),
}


def decode_and_say(data: bytes) -> int:
    """Bytes of memory that were reckoned with."""
    taken = []
    memory.take = lambda size_bytes, bound_bytes: taken.append(size_bytes)
    decode(data, "image")
    return sum(taken)


@pytest.mark.parametrize("kind", COSTLY)
def test_no_more_memory_is_taken_than_was_reckoned_with(kind: str) -> None:
    outcome = call_bounded(decode_and_say, COSTLY[kind](), max_mib=512)
    assert outcome.error is None
    assert outcome.peak_mib * MIB <= 1.05 * outcome.result + 4 * MIB


def test_images_beyond_the_bound_wait_for_each_other() -> None:
    """Eight threads, of which only two may hold a large image at a time."""
    most, at_once, lock = 0, 0, threading.Lock()
    size_bytes = 10 * memory.FREE_BYTES

    def hold() -> None:
        nonlocal most, at_once
        with memory.held():
            memory.take(size_bytes, 2 * size_bytes)
            with lock:
                at_once += 1
                most = max(most, at_once)
            threading.Event().wait(0.02)
            with lock:
                at_once -= 1

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, at_once) == (2, 0)


def test_an_image_above_the_bound_is_decoded_alone_and_in_turn() -> None:
    order: list[str] = []
    first_holds, first_may_go = threading.Event(), threading.Event()

    def hold(name: str, size_bytes: int) -> None:
        with memory.held():
            memory.take(size_bytes, 2 * memory.FREE_BYTES)
            order.append(name)
            if name == "first":
                first_holds.set()
                assert first_may_go.wait(30)

    sizes = {"first": memory.FREE_BYTES + 1, "large": 2**40, "small": memory.FREE_BYTES + 1}
    threads = [threading.Thread(target=hold, args=item) for item in sizes.items()]
    threads[0].start()
    assert first_holds.wait(30)
    for number, thread in enumerate(threads[1:], 1):
        thread.start()
        while len(memory._queue) < number:
            threading.Event().wait(0.001)
    assert order == ["first"], "the small one would fit, but does not overtake"
    first_may_go.set()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "large", "small"]


def test_a_large_image_is_held_until_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    fit = resize.fit_square
    monkeypatch.setattr(
        resize, "fit_square", lambda *args: (held.append(memory._held_bytes), fit(*args))[1]
    )
    resize.decode_square(png(2000, 2000, 8, 6), "image", 8)
    assert held[0] >= 7 * 2000 * 2000
    assert memory._held_bytes == 0
    with pytest.raises(DataError):
        resize.decode_square(png(2000, 2000, 8, 6)[:-200], "image", 8)
    assert memory._held_bytes == 0, "also after an error"


# ---- limits that honest files do not meet ----------------------------------------------------


def test_the_bound_of_scans_is_for_more_than_the_usual_ones() -> None:
    large = blank("RGB", "JPEG", progressive=True)
    assert decode(large, "image", limits=ImageLimits(scan_pixels=1)).shape == (SIDE, SIDE, 3)
    with pytest.raises(DataError, match=r"16x16 px in more than 16 scans.*--max_scan_pixels 1"):
        decode(scans(16, 21), "image", limits=ImageLimits(scan_pixels=1, flags="--"))


def test_a_film_behind_a_photograph_is_no_scan() -> None:
    data = blank("RGB", "JPEG", 64, progressive=True)
    film = np.random.default_rng(0).integers(0, 256, 2**21, dtype=np.uint8).tobytes()
    assert film.count(b"\xff\xda") > 16
    limits = ImageLimits(scan_pixels=1)
    both = decode(data + film, "image", limits=limits)
    np.testing.assert_array_equal(both, decode(data, "image"))


def test_reasons_are_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("\x1b[2J\r\nforged line \ud800 \u202e" + 999 * "x")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError) as error:
        decode(png(8, 8, 8, 2), "image")
    text = str(error.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 300
