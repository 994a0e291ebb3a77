"""The cache of decoded splits: what it gives back is what was stored, or nothing."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightship.config import DataConfig
from lightship.data import decoded_cache, image_split
from lightship.data.decoded_cache import DecodedCache, key_of
from lightship.data.image_split import ImageSplit
from lightship.data.sources import layouts
from lightship.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
BYTES = PIXELS.nbytes + 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "decoded"


def test_gives_back_what_was_stored(folder: Path) -> None:
    cache = DecodedCache(10**6, folder)
    assert cache.load("a" * 32, PIXELS.shape) is None
    cache.store("a" * 32, PIXELS)
    loaded = cache.load("a" * 32, PIXELS.shape)
    assert loaded is not None
    np.testing.assert_array_equal(loaded, PIXELS)
    loaded[:] = 0  # a copy of its own
    again = cache.load("a" * 32, PIXELS.shape)
    assert again is not None
    np.testing.assert_array_equal(again, PIXELS)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["a" * 32 + ".pixels"]


@pytest.mark.parametrize("damage", ["a bit", "cut", "another shape", "footer"])
def test_what_is_damaged_is_removed(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, shape = DecodedCache(10**6, folder), PIXELS.shape
    cache.store("a" * 32, PIXELS)
    [path] = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[7] ^= damage == "a bit"
    content[-60] ^= damage == "footer"
    path.write_bytes(content[: -1 if damage == "cut" else None])
    if damage == "another shape":
        shape = (3, 5, 5, 3)
    assert cache.load("a" * 32, shape) is None
    assert "is damaged" in caplog.text
    assert not path.exists()


def test_the_least_recently_used_go_first(folder: Path) -> None:
    cache = DecodedCache(3 * BYTES, folder)
    for number, name in enumerate("abc"):
        cache.store(name * 32, PIXELS)
        os.utime(folder / f"{name * 32}.pixels", (number, number))
    assert cache.load("a" * 32, PIXELS.shape) is not None  # is used
    cache.store("d" * 32, PIXELS)
    assert {path.name[0] for path in folder.iterdir()} == set("acd")
    DecodedCache(BYTES - 1, folder).store("e" * 32, PIXELS)  # never fits
    assert {path.name[0] for path in folder.iterdir()} == set("acd")


@pytest.mark.parametrize("kind", ["open to others", "a link", "a linked file", "a file"])
def test_only_a_folder_of_the_user_alone_is_used(kind: str, folder: Path) -> None:
    theirs = folder.parent / "theirs"
    DecodedCache(10**6, theirs).store("a" * 32, PIXELS)
    if kind == "open to others":
        theirs.rename(folder)
        folder.chmod(0o750)
    elif kind == "a link":
        folder.symlink_to(theirs)
    elif kind == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir(0o700)
        (folder / f"{'a' * 32}.pixels").symlink_to(theirs / f"{'a' * 32}.pixels")
    cache = DecodedCache(10**6, folder)
    assert cache.load("a" * 32, PIXELS.shape) is None
    if kind != "a linked file":
        cache.store("b" * 32, PIXELS)
        assert not (folder / f"{'b' * 32}.pixels").exists()


def test_a_split_is_decoded_once_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until an image changes, even one of the same size and times, or how it is decoded."""
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded_cache, "CACHED_BYTES", 1)
    monkeypatch.setattr(image_split.storage, "in_daemon", lambda store: store())
    decoded = []
    decode_all = image_split.decode_all
    monkeypatch.setattr(
        image_split,
        "decode_all",
        lambda *args, **more: decoded.append(1) or decode_all(*args, **more),
    )
    for name, colour in (("x", "red"), ("y", "blue"), ("x", "green")):
        path = tmp_path / f"images/train/{name}/{colour}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    manifest = layouts.scan(str(tmp_path / "images"))["train"]

    def colours(manifest=manifest, **settings) -> np.ndarray:
        config = DataConfig(**settings)
        split = ImageSplit(config, "train", manifest, config.image_size_px)
        assert split.decoded is not None
        return split.decoded.numpy()[:, 0, 0].copy()

    first = colours()
    assert decoded == [1]
    np.testing.assert_array_equal(colours(), first)
    assert decoded == [1]
    red = tmp_path / "images/train/x/red.bmp"
    status, size = red.stat(), red.stat().st_size
    Image.new("RGB", (8, 8), (1, 2, 3)).save(red)
    assert red.stat().st_size == size
    os.utime(red, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [1, 2, 3] in colours().tolist()
    assert decoded == [1, 1]
    colours(image_size_px=4)
    assert decoded == [1, 1, 1]
    with pytest.raises(DataError, match=r"has \d+ bytes, more than --data.max_sample_mib"):
        colours(manifest.within(1e-5), image_size_px=4)
    assert decoded == [1] * 4
    colours(decoded_cache_gib=0)
    assert decoded == [1] * 5


def test_what_has_no_sign_of_its_content_is_not_cached(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    manifest = layouts.scan_images(str(tmp_path))
    remote = dataclasses.replace(manifest, root="s3://bucket/images")
    assert key_of(manifest, []) is not None
    assert key_of(remote, []) is None
    checked = dataclasses.replace(remote, crc32=np.full(len(remote), 7))
    assert key_of(checked, []) is not None
    assert key_of(dataclasses.replace(checked, crc32=np.full(len(remote), 8)), []) != key_of(
        checked, []
    )
    (tmp_path / "x.png").unlink()
    assert key_of(manifest, []) is None
