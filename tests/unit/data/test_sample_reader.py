"""Bytes and pixels: awkward images look as on a white page, bad ones are told, reads are few."""

import dataclasses
import gzip
import io
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from lightship import storage
from lightship.data import sample_reader
from lightship.data.images import resize
from lightship.data.images.decode import decode
from lightship.data.images.resize import decode_square, fit_square
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.errors import ConfigError, DataError
from tests.support.images import encoded, expected, little_set, parquet, put, tarred, zipped

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


# ---- reading -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    put(str(tmp_path / "set"), little_set())
    return tmp_path / "set"


def bytes_of(manifest: Manifest, ids: list[int] | None = None) -> list[bytes | DataError]:
    ids = list(range(len(manifest))) if ids is None else ids
    got = list(sample_reader.read_samples(manifest, ids))
    assert [i for i, _ in got] == ids
    return [data for _, data in got]


def test_samples_come_in_the_order_of_the_ids(folder):
    files = little_set()
    manifest = layouts.scan(str(folder))["train"]
    ids = [11, 0, 5, 5, 1]
    assert bytes_of(manifest, ids) == [files[manifest.name(i)] for i in ids]


@pytest.mark.parametrize("container", ["tar", "tar.gz", "parquet"])
def test_order_of_the_ids_in_containers(tmp_path, container):
    files = little_set(("train",))
    if container == "parquet":
        put(str(tmp_path / "set"), parquet(files))
    else:
        put(str(tmp_path / "set"), {f"x.{container}": tarred(files, container == "tar.gz")})
    manifest = layouts.scan(str(tmp_path / "set"))["train"]
    ids = [11, 0, 5, 5, 1]
    assert bytes_of(manifest, ids) == [sorted(files.items())[i][1] for i in ids]


@pytest.fixture
def spans_read(monkeypatch) -> list[storage.Span]:
    """The spans asked of storage, which still reads them."""
    asked: list[storage.Span] = []
    really_read = storage.read_spans

    def read_spans(spans, on_error="raise"):
        asked.extend(spans)
        return really_read(spans, on_error)

    monkeypatch.setattr(storage, "read_spans", read_spans)
    return asked


def test_neighbours_in_a_tar_are_one_request(tmp_path, spans_read):
    put(str(tmp_path), {"x.tar": tarred(little_set(("train",)))})
    manifest = layouts.scan(str(tmp_path))["train"]
    assert len(bytes_of(manifest)) == 12
    assert len(spans_read) == 1


def test_requests_are_bounded_and_skip_wide_gaps(tmp_path, spans_read):
    blob = np.random.default_rng(0).integers(0, 256, 12 * 2**20, dtype=np.uint8).tobytes()
    put(str(tmp_path), {"blob": blob})
    length = 2**19
    manifest = Manifest(
        root=str(tmp_path),
        files=["blob"],
        file_index=np.zeros(22, dtype=np.int32),
        offset=np.array([i * length for i in range(20)] + [11 * 2**20, 11 * 2**20 + 100]),
        length=np.array([length] * 20 + [100, 100]),
        label=np.zeros(22, dtype=np.int64),
        crc32=np.full(22, -1),
        class_names=["0"],
        container="bytes",
        encoding="image",
    )
    got = bytes_of(manifest)
    for i, data in enumerate(got):
        assert data == blob[manifest.offset[i] : manifest.offset[i] + manifest.length[i]]
    assert [(s.end - s.start) / 2**20 for s in spans_read if s.end] == [8, 2, 200 / 2**20]


def bad_folder(folder: Path) -> tuple[Manifest, dict[int, str]]:
    """A manifest some of whose files have gone bad, and the word that tells of each."""
    paths = [folder / "train" / "ant" / f"{i:03d}.png" for i in range(4)]
    paths[1].write_bytes(b"")
    manifest = layouts.scan(str(folder))["train"]
    paths[0].write_bytes(paths[0].read_bytes()[:50])
    paths[2].unlink()
    return manifest, {0: "truncated", 1: "empty", 2: "not found"}


def test_bad_files_are_handed_out_as_errors_that_name_them(folder):
    manifest, bad = bad_folder(folder)
    for i, data in enumerate(bytes_of(manifest)):
        if i in bad:
            assert isinstance(data, DataError)
            assert f"train/ant/{i:03d}.png" in str(data)
            assert bad[i] in str(data)
        else:
            assert isinstance(data, bytes)


def test_of_a_truncated_tar_the_whole_samples_are_read(tmp_path):
    files = little_set(("train",))
    put(str(tmp_path), {"x.tar": tarred(files)})
    manifest = layouts.scan(str(tmp_path))["train"]
    cut = int(manifest.offset[9]) + 10
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    got = bytes_of(manifest)
    assert got[:9] == [data for _, data in sorted(files.items())[:9]]
    assert all(isinstance(data, DataError) and "x.tar#" in str(data) for data in got[9:])


def test_a_damaged_gzip_makes_all_its_samples_bad(tmp_path):
    put(str(tmp_path), {"x.tgz": tarred(little_set(("train",)), gzipped=True)})
    manifest = layouts.scan(str(tmp_path))["train"]
    whole = (tmp_path / "x.tgz").read_bytes()
    for damaged in (whole[: len(whole) // 2], gzip.compress(b"short")):
        (tmp_path / "x.tgz").write_bytes(damaged)
        assert all(isinstance(data, DataError) for data in bytes_of(manifest))


def test_checksums_are_compared(tmp_path):
    put(str(tmp_path), {"x.zip": zipped(little_set(("train",)))})
    manifest = layouts.scan(str(tmp_path / "x.zip"))["train"]
    crc32 = manifest.crc32.copy()
    crc32[3] ^= 1
    got = bytes_of(dataclasses.replace(manifest, crc32=crc32))
    assert isinstance(got[3], DataError)
    assert "checksum" in str(got[3])
    assert [i for i, data in enumerate(got) if isinstance(data, DataError)] == [3]


def test_a_null_row_of_parquet_is_bad(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = encoded(picture())
    rows = [{"bytes": good, "path": "a"}, {"bytes": None, "path": "b"}, None]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 1]}), tmp_path / "train.parquet")
    got = bytes_of(layouts.scan(str(tmp_path))["train"])
    assert got[0] == good
    assert all(isinstance(data, DataError) and "no image bytes" in str(data) for data in got[1:])


def test_storage_that_refuses_is_no_samples_fault():
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        one = np.zeros(1, dtype=np.int64)
        manifest = Manifest(
            f"http://127.0.0.1:{server.server_port}", ["a.png"], one.astype(np.int32), one,
            one + 99, one, one - 1, ["0"], "bytes", "image")  # fmt: skip
        with pytest.raises(ConfigError, match="403"):
            decode_all(manifest, max_bad_fraction=1)
    finally:
        server.shutdown()
        server.server_close()


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


# ---- whole splits ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_decode_all_gives_every_image_in_the_order_of_the_ids(folder, threads):
    manifest = layouts.scan(str(folder))["val"]
    ids = np.random.default_rng(0).permutation(len(manifest))
    images, bad = decode_all(manifest, ids, threads=threads)
    truth = expected(little_set())["val"]
    np.testing.assert_array_equal(images, np.stack([truth[i][1] for i in ids]))
    assert images.dtype == np.uint8
    assert not bad.reasons


def test_decode_all_resizes(folder):
    manifest = layouts.scan(str(folder))["train"]
    images, _ = decode_all(manifest, image_size_px=5)
    assert images.shape == (12, 5, 5, 3)
    one = decode(bytes_of(manifest, [7])[0], "image")  # type: ignore[arg-type]
    np.testing.assert_array_equal(images[7], fit_square(one, 5))


def test_images_of_two_sizes_need_image_size_px(folder):
    (folder / "train" / "bee" / "001.png").write_bytes(encoded(picture()))
    manifest = layouts.scan(str(folder))["train"]
    with pytest.raises(DataError) as error:
        decode_all(manifest)
    for word in ("train/bee/001.png", "28x20", "8x8", "--data.image_size_px"):
        assert word in str(error.value)
    assert decode_all(manifest, image_size_px=8)[0].shape == (12, 8, 8, 3)


def test_a_bad_image_stops_by_default_and_is_named(folder):
    manifest, _ = bad_folder(folder)
    with pytest.raises(DataError, match=r"train/ant/000\.png.*--data\.on_error skip"):
        decode_all(manifest)


def test_what_does_not_decode_is_named_too(folder):
    (folder / "train" / "cat" / "003.png").write_bytes(b"not an image")
    manifest = layouts.scan(str(folder))["train"]
    with pytest.raises(DataError, match=r"train/cat/003\.png: no image"):
        decode_all(manifest)


def test_a_split_of_bad_images_alone_is_refused_whatever_the_bound(folder):
    manifest = layouts.scan(str(folder))["train"].take([0, 1])
    for i in range(2):
        (folder / manifest.name(i)).write_bytes(b"x" * int(manifest.length[i]))
    with pytest.raises(DataError, match="none of 2 images"):
        decode_all(manifest, max_bad_fraction=1)


def test_bad_images_are_skipped_and_marked_up_to_the_bound(folder):
    (folder / "train" / "cat" / "003.png").write_bytes(b"not an image")
    manifest, bad_ones = bad_folder(folder)
    images, bad = decode_all(manifest, max_bad_fraction=4 / 12)
    assert sorted(bad.reasons) == [*bad_ones, 11]
    assert not images[sorted(bad.reasons)].any()
    truth = expected(little_set())["train"]
    for i in set(range(12)) - set(bad.reasons):
        np.testing.assert_array_equal(images[i], truth[i][1])
    with pytest.raises(DataError, match=r"4 of 12 .*--data\.max_bad_fraction 0\.3"):
        decode_all(manifest, max_bad_fraction=0.3)


def test_decode_all_opens_each_gzipped_file_once(tmp_path, monkeypatch):
    files = little_set(("train",), per_class=12)
    shards = {f"{name}.tgz": tarred({p: d for p, d in files.items() if name in p}, True)
              for name in ("ant", "bee", "cat")}  # fmt: skip
    put(str(tmp_path), shards)
    manifest = layouts.scan(str(tmp_path))["train"]
    opened: Counter[str] = Counter()
    really_open = storage.open_binary

    def open_binary(url):
        opened[storage.base_name(url)] += 1
        return really_open(url)

    monkeypatch.setattr(storage, "open_binary", open_binary)
    ids = np.random.default_rng(0).permutation(len(manifest))
    images, _ = decode_all(manifest, ids)
    truth = expected(files)["train"]
    np.testing.assert_array_equal(images, np.stack([truth[i][1] for i in ids]))
    assert opened == dict.fromkeys(shards, 1)


def test_exif_transpose_of_pillow_agrees_with_the_table_above():
    exif = Image.Exif()
    exif[0x112] = 6
    data = saved(Image.fromarray(np.ascontiguousarray(np.rot90(picture()))), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(upright), picture())
