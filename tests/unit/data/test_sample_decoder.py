"""Whole splits decoded: in the order of the ids; bad images are named, or skipped and counted."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.data.images.decode import decode
from lightship.data.images.resize import fit_square
from lightship.data.sample_decoder import decode_all
from lightship.data.sources import layouts
from lightship.errors import DataError
from tests.support.images import bad_folder, encoded, expected, little_set, put, tarred


@pytest.fixture
def folder(tmp_path) -> Path:
    put(str(tmp_path / "set"), little_set())
    return tmp_path / "set"


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
    one = decode((folder / manifest.name(7)).read_bytes(), "image")
    np.testing.assert_array_equal(images[7], fit_square(one, 5))


def test_images_of_two_sizes_need_image_size_px(folder):
    (folder / "train" / "bee" / "001.png").write_bytes(encoded(np.zeros((20, 28, 3), np.uint8)))
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
