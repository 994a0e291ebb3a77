"""The index of packed shards: a run takes it as it lies; that of 0.1.0 is read."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightship import storage
from lightship.config import DataConfig, PackConfig
from lightship.data.columns import Columns
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import open_table, write_table
from lightship.data.mapped_split import NUMBERS
from lightship.data.shards.index import INDEX, INDEX_0_1, load_index, shard_sizes
from lightship.data.shards.pack import pack
from lightship.data.sources import layouts
from lightship.data.splits import load_splits, scan_splits
from lightship.errors import DataError
from lightship.storage.file_list import FileList
from tests.support.images import little_set, put
from tests.support.older_manifest import save_manifests

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))


def packed(tmp_path: Path, *splits: str) -> Path:
    source = put(str(tmp_path / "from"), little_set(splits))
    pack(source, str(tmp_path / "to"), PackConfig(shard_mib=0.006), lambda done, total: None)
    return tmp_path / "to"


def as_by_0_1_0(root: Path) -> None:
    """Give a pack the index of that version in place of its own."""
    save_manifests(str(root / INDEX_0_1), open_table(Columns(root / INDEX)))
    (root / INDEX).unlink()


def assert_same(found: dict[str, Manifest], expected: dict[str, Manifest]) -> None:
    assert list(found) == list(expected)
    for split, manifest in expected.items():
        assert found[split].fingerprint() == manifest.fingerprint()
        for column in NUMBERS:
            values = getattr(manifest, column)
            np.testing.assert_array_equal(getattr(found[split], column), values, column)


@pytest.mark.parametrize("splits", [SPLITS, ("train", "test")])
def test_the_table_of_a_run_is_the_index(
    tmp_path: Path, splits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = packed(tmp_path, *splits), tmp_path / "run"
    fraction = 0.1 if "val" in splits else 0.0
    config = DataConfig(root=str(root), val_fraction=fraction)

    def fail(*args: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr("lightship.data.splits.write_table", fail)
    for scanned in (None, scan_splits(config, "train")):
        found = load_splits(config, str(run), "train", scanned, use_saved=False)
        [table] = run.iterdir()
        assert table.read_bytes() == (root / INDEX).read_bytes()
        table.unlink()
    assert {manifest.root for manifest in found.values()} == {str(root)}
    [copy] = (tmp_path / "cache" / "tables").iterdir()
    assert copy.read_bytes() == (root / INDEX).read_bytes()


def test_val_is_held_out_of_a_pack_as_of_its_source(tmp_path: Path) -> None:
    root = packed(tmp_path, "train")
    found = load_splits(DataConfig(root=str(root), val_fraction=0.3), str(tmp_path / "1"), "val")
    source = DataConfig(root=str(tmp_path / "from"), val_fraction=0.3)
    expected = load_splits(source, str(tmp_path / "2"), "val")
    for split in ("train", "val"):
        np.testing.assert_array_equal(found[split].length, expected[split].length)
        np.testing.assert_array_equal(found[split].label, expected[split].label)


def test_an_index_of_0_1_0_is_read_and_its_pack_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightship")
    root = packed(tmp_path, *SPLITS)
    expected = layouts.scan(str(root))
    as_by_0_1_0(root)
    assert_same(layouts.scan(str(root)), expected)
    packed(tmp_path, *SPLITS)
    assert "already packed" in caplog.messages[-1]
    assert not (root / INDEX).exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_pack_of_0_1_0_that_is_packed_again_has_the_new_index_alone(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    root = packed(tmp_path, *SPLITS)
    expected = layouts.scan(str(root))
    as_by_0_1_0(root)
    damage(root / INDEX_0_1)
    packed(tmp_path, *SPLITS)
    assert not (root / INDEX_0_1).exists()
    assert_same(layouts.scan(str(root)), expected)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "train/../x", "predict", ""])
@pytest.mark.parametrize("version", ["0.1.0", "now"])
def test_a_split_of_another_name_is_refused_before_anything_is_packed(
    tmp_path: Path, name: str, version: str
) -> None:
    root = packed(tmp_path, *SPLITS)
    splits = open_table(Columns(root / INDEX))
    renamed = {name if split == "val" else split: each for split, each in splits.items()}
    (root / INDEX).unlink()
    if version == "now":
        write_table(root / INDEX, renamed)
    else:
        save_manifests(str(root / INDEX_0_1), renamed)
    before = set(tmp_path.glob("**/*"))
    with pytest.raises(DataError, match=r"has the split .*, not one of train, val, test"):
        pack(str(root), str(tmp_path / "deep" / "new"), PackConfig(), lambda done, total: None)
    added = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.glob("**/*")) - before}
    assert added <= {"deep", "cache"}
    assert not list((tmp_path / "deep").glob("**/*.tar"))


def test_three_million_samples_are_found_in_memory_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightship.storage.local.COPIED_BYTES", 2**21)
    count = 3 * 10**6
    places = np.arange(count)
    train = Manifest(
        root="", files=FileList.of(f"train/shard-{i:05d}.tar" for i in range(-(-count // 2000))),
        file_index=places // 2000, offset=places % 2000 * 113_152 + 1536,
        length=places % 99_991 + 1, label=places * 100 // count, crc32=places * 7919 % 2**32,
        class_names=[str(i) for i in range(100)], container="bytes", encoding="image",
    )  # fmt: skip
    write_table(tmp_path / INDEX, {"train": train})
    listed = {**shard_sizes(train), INDEX: (tmp_path / INDEX).stat().st_size}
    tracemalloc.start()
    found = load_index(str(tmp_path), INDEX, "it", listed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert storage.size_bytes(str(tmp_path / INDEX)) > 40 * 10**6
    assert peak < 24 * 2**20
    assert len(found["train"]) == count
