"""Every layout on every storage packs to the same images, labels and order, index or not."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.config import PackConfig
from lightship.data import sample_reader
from lightship.data.manifest import Manifest
from lightship.data.sample_decoder import decode_all
from lightship.data.shards.index import INDEX
from lightship.data.shards.pack import pack
from lightship.data.sources import layouts
from lightship.errors import ConfigError, DataError
from tests.support import images
from tests.support.images import CLASSES, Files, expected, little_set, put

FILES = little_set()
SHARD_MIB = 0.006
"""Four images of FILES a shard, so that each split has several."""
CIFAR = images.cifar10(images.cifar_pixels(10), images.cifar_pixels(4, seed=1))
SOURCES: dict[str, Files] = {
    "folders": FILES,
    "x.zip": {"x.zip": images.zipped(FILES)},
    "x.tar": {"x.tar": images.tarred(FILES)},
    "x.tar.gz": {"x.tar.gz": images.tarred(FILES, gzipped=True)},
    "shards": images.webdataset(FILES),
    "gzipped shards": images.webdataset(FILES, gzipped=True),
    "Parquet": images.parquet(FILES),
    "CIFAR": CIFAR,
    "c.tar.gz": {"c.tar.gz": images.tarred(CIFAR, gzipped=True)},
}


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> str:
    """An empty place on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "set")
    if request.param == "memory":
        return f"memory://pack-{tmp_path.name}-{request.node.name}".replace("[", "-").rstrip("]")
    return request.getfixturevalue("s3").url("set")


def packed(source: str, destination: str, **options) -> str:
    options = {"shard_mib": SHARD_MIB, **options}
    pack(source, destination, PackConfig(**options), lambda done, total: None)
    return destination


def content(manifest: Manifest) -> list[tuple[str, bytes]]:
    """(class, pixels) in the manifest's order."""
    pixels, bad = decode_all(manifest)
    assert not bad.reasons
    names = [manifest.class_names[label] for label in manifest.label]
    return [(name, image.tobytes()) for name, image in zip(names, pixels, strict=True)]


def stored(manifest: Manifest) -> list[bytes]:
    got = [data for _, data in sample_reader.read_samples(manifest, range(len(manifest)))]
    assert all(isinstance(data, bytes) for data in got)
    return got


def source_at(url: str, name: str) -> str:
    put(url, SOURCES[name])
    return storage.join(url, name) if name in SOURCES[name] else url


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_images_labels_and_order_with_the_index_and_without(store: str, name: str) -> None:
    source = source_at(storage.join(store, "from"), name)
    before = layouts.scan(source)
    root = packed(source, storage.join(store, "to"))
    indexed = layouts.scan(root)
    storage.remove(storage.join(root, INDEX))
    scanned = layouts.scan(root)
    assert sorted(before) == sorted(indexed) == sorted(scanned)
    for split, manifest in before.items():
        assert content(indexed[split]) == content(manifest) == content(scanned[split])
        assert indexed[split].class_names == scanned[split].class_names == list(CLASSES)
        assert len(indexed[split].files) > 1, "several shards"
        assert (indexed[split].crc32 >= 0).all()
        assert (scanned[split].crc32 == -1).all(), "scanned indeed, not read from an index"
        np.testing.assert_array_equal(indexed[split].offset, scanned[split].offset)
        if manifest.encoding == "image":
            assert stored(indexed[split]) == stored(manifest), "copied byte for byte"


def test_from_one_storage_to_another_and_back(tmp_path: Path, s3) -> None:
    there = packed(put(str(tmp_path / "from"), FILES), s3.url("there"))
    back = packed(there, str(tmp_path / "back"), shard_mib=256)
    for split, pairs in expected(FILES).items():
        manifest = layouts.scan(back)[split]
        assert content(manifest) == [(name, pixels.tobytes()) for name, pixels in pairs]
        assert manifest.files == [f"{split}/shard-00000.tar"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_unlabelled_images_of_packed_shards(where: str, tmp_path: Path, request) -> None:
    local = where == "local"
    to = str(tmp_path / "to") if local else request.getfixturevalue("s3").url("to")
    root = packed(put(str(tmp_path / "from"), FILES), to)
    indexed = layouts.scan_images(root)
    storage.remove(storage.join(root, INDEX))
    scanned = layouts.scan_images(root)
    assert len(indexed) == len(FILES)
    assert stored(indexed) == stored(scanned)
    assert (indexed.label == -1).all()
    assert indexed.class_names == []


@pytest.mark.parametrize("size_px", [(8, 8), (32, 32)])
def test_the_webdataset_package_reads_the_shards(tmp_path: Path, size_px: tuple[int, int]) -> None:
    import webdataset

    files = little_set(per_class=5, size_px=size_px)
    root = packed(put(str(tmp_path / "from"), files), str(tmp_path / "to"))
    for split, pairs in expected(files).items():
        urls = sorted(str(path) for path in (tmp_path / "to" / split).glob("*.tar"))
        assert len(urls) > 1
        peer = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
        samples = list(peer.to_tuple("__key__", "png", "cls"))
        assert [key for key, _, _ in samples] == [f"{i:09d}" for i in range(len(pairs))]
        names = (Path(root) / "classes.txt").read_text().splitlines()
        assert [names[label] for _, _, label in samples] == [name for name, _ in pairs]
        for (_, pixels, _), (_, truth) in zip(samples, pairs, strict=True):
            np.testing.assert_array_equal(pixels, truth)


def test_tar_itself_reads_the_shards(tmp_path: Path) -> None:
    root = packed(put(str(tmp_path / "from"), FILES), str(tmp_path / "to"))
    paths = sorted(Path(root).rglob("*.tar"))
    members = []
    for path in paths:
        with tarfile.open(path) as tar:
            members += [(path.parent.name, member.name) for member in tar]
    assert members == [
        (split, f"{i:09d}.{ending}")
        for split in ("test", "train", "val")
        for i in range(12)
        for ending in ("cls", "png")
    ]


# ---- the index ---------------------------------------------------------------------------------


def test_reading_the_index_opens_no_shard(store: str, monkeypatch) -> None:
    root = packed(put(storage.join(store, "from"), FILES), storage.join(store, "to"))
    asked: list[str] = []
    read_spans, open_binary = storage.read_spans, storage.open_binary

    def spy_spans(spans, *args, **more):
        asked.extend(span.url for span in spans)
        return read_spans(spans, *args, **more)

    monkeypatch.setattr("lightship.storage.reads.read_spans", spy_spans)
    monkeypatch.setattr(
        "lightship.storage.api.open_binary", lambda url: asked.append(url) or open_binary(url)
    )
    assert sum(len(manifest) for manifest in layouts.scan(root).values()) == len(FILES)
    assert set(asked) == {storage.join(root, INDEX)}


def test_shards_on_a_web_server_where_nothing_can_be_listed(tmp_path: Path, s3) -> None:
    """SeaweedFS's filer is a plain web server beside its S3: it knows ranges and sizes."""
    to = s3.url("to")
    packed(put(str(tmp_path / "from"), FILES), to)
    packed(to, f"{to}.v2")
    web = f"http://127.0.0.1:{s3.ports[2]}/buckets/{to.removeprefix('s3://')}"
    manifests = layouts.scan(web)
    for split, pairs in expected(FILES).items():
        got = content(manifests[split])
        assert got == [(name, pixels.tobytes()) for name, pixels in pairs]
    assert len(layouts.scan_images(web)) == len(FILES)
    assert len(layouts.scan(f"{web}.v2/")["train"]) == 12, "a folder with a dot in its name"
    storage.remove(storage.join(to, "val/shard-00001.tar"))
    with pytest.raises(DataError, match=r"val/shard-00001\.tar, which is missing"):
        layouts.scan(web)


DAMAGE = {
    "the index is cut": ("cannot be used", lambda root: cut(root, INDEX)),
    "the index is something else": (
        "cannot be used", lambda root: storage.write_bytes(storage.join(root, INDEX), b"x")
    ),
    "a shard is missing": (
        r"names train/shard-00001\.tar, which is missing",
        lambda root: storage.remove(storage.join(root, "train/shard-00001.tar")),
    ),
    "a shard is cut": (r"does not fit test/shard-00000\.tar: it has \d+ bytes, not 10240",
                       lambda root: cut(root, "test/shard-00000.tar")),
    "a shard is another": (
        r"does not fit test/shard-00000\.tar",
        lambda root: storage.write_bytes(
            storage.join(root, "test/shard-00000.tar"), images.tarred(FILES)
        ),
    ),
    "a shard more": (
        r"does not know train/mine\.tar \(1 such\)",
        lambda root: put(root, {"train/mine.tar": images.tarred(FILES)}),
    ),
}  # fmt: skip


def cut(root: str, file: str) -> None:
    url = storage.join(root, file)
    storage.write_bytes(url, storage.read_bytes(url)[:-100])


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_does_not_agree_with_the_shards(store: str, damage: str) -> None:
    source = put(storage.join(store, "from"), FILES)
    root = packed(source, storage.join(store, "to"))
    words, spoil = DAMAGE[damage]
    spoil(root)
    with pytest.raises(DataError, match=words) as error:
        layouts.scan(root)
    assert "pack again" in str(error.value)
    assert "remove the index" in str(error.value)
    if damage == "a shard more":
        with pytest.raises(ConfigError, match=r"train/mine\.tar"):
            packed(source, root)
        storage.remove(storage.join(root, "train/mine.tar"))
    packed(source, root)  # the first remedy
    assert {s: content(m) for s, m in layouts.scan(root).items()} == {
        s: content(m) for s, m in layouts.scan(source).items()
    }


def test_a_changed_image_in_a_shard_is_noticed_when_it_is_read(store: str) -> None:
    root = packed(put(storage.join(store, "from"), FILES), storage.join(store, "to"))
    url = storage.join(root, "train/shard-00000.tar")
    data = bytearray(storage.read_bytes(url))
    manifest = layouts.scan(root)["train"]
    data[int(manifest.offset[1]) + 20] ^= 1
    storage.write_bytes(url, bytes(data))
    samples = dict(sample_reader.read_samples(layouts.scan(root)["train"], range(len(manifest))))
    assert [i for i, data in samples.items() if not isinstance(data, bytes)] == [1]
    assert "checksum" in str(samples[1])
