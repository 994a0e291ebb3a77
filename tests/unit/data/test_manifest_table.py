"""All splits in one mapped file, and the node's copies of it."""

import dataclasses
import hashlib
import os
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightship import storage
from lightship.config import DataConfig
from lightship.data import table_cache
from lightship.data.columns import Columns
from lightship.data.held_out import hold_out, split_validation
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import check_table, open_table, write_table
from lightship.data.mapped_split import NUMBERS
from lightship.data.order_versions import order_of
from lightship.data.sample_reader import plan_spans, samples_of
from lightship.data.sources import layouts
from lightship.data.splits import load_splits
from lightship.data.streaming import pickle_with_files
from lightship.data.table_copies import copy_to_node
from lightship.errors import ConfigError, DataError
from lightship.storage.file_list import FileList
from tests.support.forged_table import forge_table
from tests.support.images import encoded, put
from tests.support.older_manifest import save_manifests
from tests.unit.data.test_manifest import manifest_of

PNG = encoded(np.zeros((8, 8, 3), dtype=np.uint8))


def tabled(path: Path, **splits: Manifest) -> dict[str, Manifest]:
    write_table(path, splits)
    check_table(columns := Columns(path))
    return open_table(columns)


def assert_equal(a: Manifest, b: Manifest) -> None:
    for column in NUMBERS:
        np.testing.assert_array_equal(getattr(a, column), getattr(b, column), column)
    for name in ("root", "files", "class_names", "container", "encoding", "members", "not_read"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.fingerprint() == b.fingerprint()
    assert (a.size_bytes, a.first_unlabelled) == (b.size_bytes, b.first_unlabelled)
    np.testing.assert_array_equal(a.block_edges(), b.block_edges())


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    train, test = manifest_of([0, 1, -1, 1, 2]), manifest_of([2, 2], classes=3)
    found = tabled(tmp_path / "t", train=train, test=test)
    assert list(found) == ["train", "test"]
    assert_equal(found["train"], train)
    assert_equal(found["test"], test)
    assert found["train"].first_unlabelled == 2
    assert found["train"].label.dtype == np.int8


def test_row_groups_names_of_members_and_names_that_are_no_text(tmp_path: Path) -> None:
    table = dataclasses.replace(
        manifest_of([0, 0, 1, 1]), container="parquet", length=np.array([5, 5, 9, 9]),
        files=["a\udce9", "é"], members=["m", "", "\udcff", "ö"], not_read="24 .heic files",
    )  # fmt: skip
    assert_equal(tabled(tmp_path / "t", train=table)["train"], table)
    assert table.block_edges().tolist() == [0, 2, 3, 4]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    digests = {write_table(tmp_path / name, {"train": manifest_of([0, 1])}) for name in "ab"}
    assert len(digests) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_changes_a_mapped_manifest_changes_what_is_known_of_it(tmp_path: Path) -> None:
    whole = manifest_of([0, 1, -1, 1, 2])
    mapped = tabled(tmp_path / "t", train=whole)["train"]
    changes: list[dict[str, Any]] = [
        {"length": whole.length * 2}, {"label": np.zeros(5, dtype=np.int64)},
        {"class_names": ["x", "y", "z"]}, {"container": "gzip"}, {"root": "else"},
    ]  # fmt: skip
    for change in changes:
        assert_equal(dataclasses.replace(mapped, **change), dataclasses.replace(whole, **change))
    assert_equal(mapped.take([4, 0]), whole.take([4, 0]))
    for a, b in zip(split_validation(mapped, 0.4), split_validation(whole, 0.4), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("samples", [5, 3 * 10**6])
def test_what_is_held_out_is_written_piece_by_piece_as_if_it_had_been_taken(
    tmp_path: Path, samples: int
) -> None:
    labels = np.arange(samples) % 3 - (samples == 5)
    whole = dataclasses.replace(
        manifest_of([0, 1, 2]), label=labels, length=np.arange(samples) % 250 + 5,
        file_index=np.arange(samples) * 400 // samples, offset=np.arange(samples) % 999,
        crc32=np.arange(samples), files=[f"{i:{i % 7 + 1}}é" for i in range(400)],
        members=[str(i) for i in range(samples)] if samples == 5 else None,
    )  # fmt: skip
    mapped = tabled(tmp_path / "whole", train=whole, test=whole.take([1]))
    train, val = split_validation(whole, 0.4)
    write_table(tmp_path / "taken", {"train": train, "test": whole.take([1]), "val": val})
    held_out = hold_out(mapped["train"], 0.4)
    tracemalloc.start()
    write_table(tmp_path / "held out", mapped, held_out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "held out").read_bytes() == (tmp_path / "taken").read_bytes()
    assert peak < samples + 24 * 2**20


def large(samples: int) -> Manifest:
    """Class folders, of which each name is 31 bytes."""
    label = np.arange(samples) * 1000 // samples
    return dataclasses.replace(
        manifest_of([0]),
        files=FileList.of(f"train/n{i // 1000:08d}/{i:012d}.JPEG" for i in range(samples)),
        file_index=np.arange(samples, dtype=np.int32), offset=np.zeros(samples, dtype=np.int64),
        length=np.random.default_rng(0).integers(20_000, 200_000, samples), label=label,
        crc32=np.full(samples, -1), class_names=[str(i) for i in range(1000)],
    )  # fmt: skip


def test_neither_columns_nor_names_travel_to_the_worker(tmp_path: Path) -> None:
    mapped = tabled(tmp_path / "t", train=large(100_000))["train"]
    (tmp_path / "t").unlink()  # as a cleaner of caches does
    changed = dataclasses.replace(mapped, label=mapped.label + 1)
    moved = dataclasses.replace(mapped, root="s3://x").within(1)
    for manifest, least, bound in ((moved, 0, 2000), (changed, 100_000, 10**6)):
        sent, [descriptor] = pickle_with_files.dumps((manifest, manifest.mapped))
        assert least < len(sent) < bound
        came, _ = pickle_with_files.loads(sent, [os.dup(descriptor)])
        assert_equal(came, manifest)
        assert came.max_sample_bytes == manifest.max_sample_bytes


def test_a_file_is_closed_with_what_maps_it(tmp_path: Path) -> None:
    mapped = tabled(tmp_path / "t", train=manifest_of([0, 1]))["train"]
    sent, [descriptor] = pickle_with_files.dumps(mapped)
    came = pickle_with_files.loads(sent, [theirs := os.dup(descriptor)])
    os.fstat(theirs)
    del came
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(theirs)
    del mapped
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_opening_a_million_samples_and_their_first_batch_takes_memory_of_the_batch(
    tmp_path: Path,
) -> None:
    write_table(tmp_path / "t", {"train": large(10**6)})
    tracemalloc.start()
    train = open_table(Columns(tmp_path / "t"))["train"]
    order = order_of(train, 1024, seed=0)
    ids = order.ids(0, np.arange(1024))
    spans = plan_spans(train, ids[np.argsort(train.file_index[ids])])
    labels = train.label[ids]
    assert (train.first_unlabelled, len(train.fingerprint())) == (None, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(spans) > 900
    assert len(set(labels.tolist())) > 200
    assert peak < 4 * 2**20
    assert (tmp_path / "t").stat().st_size < 50 * 10**6  # names: 31 + 4 bytes


def test_narrow_columns_are_computed_with_as_wide_ones(tmp_path: Path) -> None:
    """Sums of 32-bit offsets and lengths, and differences to the start of a request."""
    wide = dataclasses.replace(
        manifest_of([0, 1, 0]), offset=np.array([2**32 - 1000, 2**32 - 500, 10]),
        length=np.array([400, 100, 255]), file_index=np.array([0, 0, 0], dtype=np.int32),
    )  # fmt: skip
    mapped = tabled(tmp_path / "t", train=wide)["train"]
    assert (mapped.offset.dtype, mapped.length.dtype) == (np.uint32, np.uint16)
    for ids in ([0, 1], [2]):
        [(span, run)] = plan_spans(mapped, np.array(ids))
        [(expected, _)] = plan_spans(wide, np.array(ids))
        assert (span, run.tolist()) == (expected, ids)
        assert span.end is not None
        data = bytes(i % 251 for i in range(span.end - span.start))
        got = samples_of(mapped, run, span.start, data)
        assert got == samples_of(wide, run, span.start, data)
        assert [len(x) for x in got.values() if isinstance(x, memoryview)] == [
            int(wide.length[i]) for i in ids
        ]


WRONG_CLASSES: dict[str, list[str]] = {
    "twice": ["a", "b", "a"], "one and the same in two forms": ["\xe9", "b", "e\u0301"],
    "empty": ["a", "b", " "], "control characters": ["a", "b", "c\x1b[2J"],
    "a lone surrogate": ["a", "b", "\ud800"], "5,000 letters": ["a", "b", "x" * 5000],
    "far more than samples": [str(i) for i in range(100_001)],
}  # fmt: skip
WRONG_ENCODINGS = [
    "raw:1x4x4", "raw:4x4x4", "raw:3x0x4", "raw:3x4x10000", "raw:3x4294967296x4294967296",
    "raw:3x\u0664x4", "raw:3x4x4\n",
]  # fmt: skip
WRONG: dict[str, dict[str, Any]] = {
    **{f"encoding {encoding!r}": {"encoding": encoding} for encoding in WRONG_ENCODINGS},
    "negative offset": {"offset": [0, -1, 5]},
    "negative length": {"length": [-5, 1, 5]},
    "an offset beyond any file": {"offset": [0, 2**60, 5]},
    "label out of range": {"label": [0, 1, 3]},
    "label below -1": {"label": [0, 1, -2]},
    "no such file": {"file_index": [0, 0, 1]},
    "a checksum of 33 bits": {"crc32": [0, 2**32, 1]},
    "no sample": {name: [] for name in NUMBERS},
    "outside the root": {"files": ["../x"]},
    "another URL": {"files": ["a::s3://b"]},
    "another URL below another root": {"root": "a/b::c://d", "files": ["x::http://e/o.zip?"]},
    "another archive below another root": {"root": "s3://a", "files": ["x::zip"]},
    "fewer members than samples": {"members": ["a", "b"]},
    **{f"class names {case}": {"class_names": names} for case, names in WRONG_CLASSES.items()},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_scan_makes_is_refused(tmp_path: Path, case: str) -> None:
    change = {
        name: np.array(values, dtype=np.int64) if name in NUMBERS else values
        for name, values in WRONG[case].items()
    }
    write_table(tmp_path / "t", {"train": dataclasses.replace(manifest_of([0, 1, 2]), **change)})
    with pytest.raises(DataError, match=str(tmp_path)) as error:
        check_table(Columns(tmp_path / "t"))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_class_names_are_checked_in_a_copy_that_an_older_version_has_accepted(
    cache: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{name}/{i}.png": PNG for name in ("ant", "bee") for i in range(2)}
    config, run = DataConfig(root=put(str(tmp_path / "set"), files)), str(tmp_path / "run")
    expected = load_splits(config, run, "train")
    [saved] = Path(run).iterdir()
    wrong = {
        split: dataclasses.replace(each, class_names=WRONG_CLASSES[case])
        for split, each in expected.items()
    }
    table_cache.upload(table_cache.store(lambda path: write_table(path, wrong)), str(saved))
    assert table_cache.local_copy(table_cache.Table.at(str(saved))) is not None
    assert_equal(load_splits(config, run, "train")["train"], expected["train"])
    assert "scanning --data.root again" in caplog.text


def test_row_groups_outside_parquet_are_refused(tmp_path: Path) -> None:
    class Other(Manifest):
        container_read = iter(["bytes", "parquet"])  # the second: what writes its row groups

        def __getattribute__(self, name: str) -> Any:
            if name == "container":
                return next(Other.container_read, "bytes")
            return super().__getattribute__(name)

    table = manifest_of([0, 1])
    fields = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    write_table(tmp_path / "t", {"train": Other(**fields)})
    assert Columns(tmp_path / "t").has("train.edges")
    with pytest.raises(DataError, match="row groups of 'bytes'"):
        open_table(Columns(tmp_path / "t"))


NOT_COUNTS = [float("inf"), float("nan"), 2.0, True, "1", None, [1]]


@pytest.mark.parametrize("key", ["size_bytes", "first_unlabelled"])
@pytest.mark.parametrize("value", NOT_COUNTS)
def test_a_summary_whose_numbers_are_no_counts_is_damaged(
    tmp_path: Path, key: str, value: Any
) -> None:
    write_table(tmp_path / "t", {"train": manifest_of([0, 1, -1])})
    forge_table(tmp_path / "t", lambda header: header["splits"]["train"].update({key: value}))
    with pytest.raises(DataError, match=r"is damaged: train|is not that of its columns"):
        check_table(Columns(tmp_path / "t"))


class Lying(Manifest):
    """A manifest with a summary that is not its own."""

    @property
    def first_unlabelled(self) -> int | None:
        return 1

    def fingerprint(self) -> str:
        return super().fingerprint() if self.root.startswith("s3") else "0" * 32


def lying(**change: Any) -> Manifest:
    table = dataclasses.replace(manifest_of([0, -1, 2], classes=3), **change)
    return Lying(**{f.name: getattr(table, f.name) for f in dataclasses.fields(table)})


def test_a_summary_of_other_columns_is_refused(tmp_path: Path) -> None:
    tabled(tmp_path / "right", train=lying())
    for name, table in {
        "fingerprint": lying(root="x"), "summary": lying(label=np.array([0, 1, 2])),
    }.items():  # fmt: skip
        write_table(tmp_path / name, {"train": table})
        with pytest.raises(DataError, match=name):
            check_table(Columns(tmp_path / name))


def test_names_that_overlap_are_refused(tmp_path: Path) -> None:
    table = manifest_of([0, 1, 2, 0])
    assert isinstance(table.files, FileList)
    for starts in ([0, 0, 32], [0, 20, 32], [0, 16, 33], [1, 16, 32], [0, 40, 32]):
        object.__setattr__(table, "files", FileList(table.files.text, np.array(starts)))
        path = tmp_path / "".join(map(str, starts))
        write_table(path, {"train": table})
        with pytest.raises((DataError, UnicodeDecodeError), match=r"names|damaged"):
            check_table(Columns(path))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTSHIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


def kept(url: str, classes: int = 0) -> table_cache.Table:
    splits = {"train": manifest_of([0, 1], classes=classes)}
    return table_cache.upload(table_cache.store(lambda path: write_table(path, splits)), url)


def test_a_node_copies_a_table_once(cache: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "run" / "manifest.table")
    table = kept(url)
    assert table_cache.Table.at(url) == table
    [made] = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    made.unlink()  # another node
    copied = table_cache.fetch(table)
    assert copied.path == made
    os.remove(url)
    assert table_cache.fetch(table).path == made
    assert_equal(open_table(copied)["train"], manifest_of([0, 1]))


def test_a_copy_that_was_cut_is_made_again(cache: Path, tmp_path: Path) -> None:
    table = kept(str(tmp_path / "run" / "manifest.table"))
    [made] = cache.iterdir()
    whole = made.read_bytes()
    made.write_bytes(whole[:-1])
    assert table_cache.fetch(table).path.read_bytes() == whole


@pytest.mark.parametrize("what", ["another table", "header", "a link", "another user's"])
def test_a_copy_that_is_not_the_table_of_its_name_is_made_again(
    cache: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = kept(str(tmp_path / "run" / "manifest.table"))
    [made] = cache.iterdir()
    whole = made.read_bytes()
    other = manifest_of([0, 1])
    other = dataclasses.replace(other, files=[file[::-1] for file in other.files])
    if what == "another table":
        made.unlink()
        write_table(made, {"train": other})
        assert made.stat().st_size == len(whole)
    elif what == "header":
        made.write_bytes(whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:])
    elif what == "a link":
        made.rename(tmp_path / "elsewhere")
        made.symlink_to(tmp_path / "elsewhere")
    elif os.getuid() == 0:
        os.chown(made, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    columns = copy_to_node(table)
    assert columns.digest == table.digest
    assert_equal(open_table(columns)["train"], manifest_of([0, 1]))
    assert made.read_bytes() == whole
    assert made.lstat().st_uid == os.getuid()
    assert not made.is_symlink()
    assert caplog.text.count("it is removed and made again") == (what != "a link")


def test_a_folder_that_others_can_replace_holds_no_copies(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    for mode, is_used in ((0o777, False), (0o1777, True), (0o755, True)):
        cache.parent.chmod(mode)
        table_cache._is_usable.cache_clear()
        columns = table_cache.fetch(kept(str(tmp_path / "manifest.table")))
        assert (columns.path.parent == cache) == is_used
        assert ("mode 0777; chmod o-w or +t" in caplog.text) != is_used
        caplog.clear()


def test_a_table_that_is_there_is_not_written_again(cache: Path, tmp_path: Path) -> None:
    kept(str(tmp_path / "1.table"))
    [made] = cache.iterdir()
    before = made.stat().st_ino
    kept(str(tmp_path / "2.table"))
    assert [path.stat().st_ino for path in cache.iterdir()] == [before]


def test_a_table_that_was_changed_is_not_taken(cache: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "run" / "manifest.table")
    table = kept(url)
    [made] = cache.iterdir()
    made.unlink()
    whole = Path(url).read_bytes()
    for changed in (b"\1" + whole[1:], whole[:-1], whole[1:], b"", whole[:200] + whole[-128:]):
        Path(url).write_bytes(changed)
        with pytest.raises(DataError, match=r"manifest\.table"):
            table_cache.fetch(table)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("classes", [3, 20_000])
def test_a_table_is_refused_by_its_header_before_it_is_copied(
    cache: Path, tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run" / "manifest.table")
    table = kept(url, classes)
    [made] = cache.iterdir()
    whole = made.read_bytes()
    made.unlink()
    assert table_cache.fetch(table, check_table).path.read_bytes() == whole
    made.unlink()
    with Path(url).open("r+b") as file:
        file.truncate(200)
        file.seek(10 * 2**30)  # behind a hole
        file.write(whole[200:])
    monkeypatch.setattr(storage, "download", pytest.fail)
    larger = table_cache.Table.at(url)
    assert larger.digest == table.digest
    with pytest.raises(DataError, match=r"manifest\.table is damaged: .* bytes of columns"):
        table_cache.fetch(larger)
    with pytest.raises(DataError, match=r"bytes of columns"):
        Columns(Path(url))


def test_what_nobody_uses_is_removed_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    kept(str(tmp_path / "1.table"))
    [made] = cache.iterdir()
    names = {"0" * 64 + ".table": 31, "1" * 64 + ".table": 29, ".killed": 2, ".new": 0, "own": 99}
    for name, days in names.items():
        (cache / name).write_bytes(b"")
        os.utime(cache / name, (0, (cache / name).stat().st_mtime - days * 86400))
    (cache / ".nfs0000").mkdir()  # cannot be removed, like an open file on NFS
    os.utime(cache / ".nfs0000", (0, 0))
    kept(str(tmp_path / "2.table"))
    left = {path.name for path in cache.iterdir()}
    assert left == {"1" * 64 + ".table", ".new", "own", ".nfs0000", made.name}


def test_without_a_folder_for_copies_a_rank_has_its_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_bytes(b"a file")
    table = kept(str(tmp_path / "run" / "manifest.table"))
    columns = copy_to_node(table)
    assert_equal(open_table(columns)["train"], manifest_of([0, 1]))
    assert stat.S_IMODE(columns.path.parent.stat().st_mode) == 0o700
    columns.path.unlink()
    monkeypatch.setattr(table_cache, "_own_folder", lambda: tmp_path / "missing")
    with pytest.raises(ConfigError, match="LIGHTSHIP_CACHE"):
        table_cache.fetch(table)


def test_a_run_begun_by_an_older_version_goes_on_with_its_table(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{name}/{i}.png": PNG for name in ("ant", "bee") for i in range(10)}
    root = put(str(tmp_path / "set"), files)
    config, run = DataConfig(root=root, val_fraction=0.2), str(tmp_path / "run")
    load_splits(config, run, "train")
    [made] = Path(run).iterdir()
    key = hashlib.sha256(f"{root}\n{None}".encode()).hexdigest()[:12]
    older = f"manifest-{key}.npz"
    save_manifests(storage.join(run, older), layouts.scan(root))
    expected = load_splits(config, run, "train")
    made.unlink()
    (tmp_path / "set" / "ant" / "new.png").write_bytes(PNG)
    found = load_splits(config, run, "train")
    assert (len(found["train"]), len(found["val"])) == (16, 4)
    for split in ("train", "val"):
        assert_equal(found[split], expected[split])
    assert made.exists()
    assert not caplog.messages
    assert len(load_splits(DataConfig(root=root), None, "train")["train"]) > 16


def test_a_saved_table_with_a_number_that_is_none_is_made_again(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{name}/{i}.png": PNG for name in ("ant", "bee") for i in range(10)}
    config = DataConfig(root=put(str(tmp_path / "set"), files))
    expected = load_splits(config, str(tmp_path / "run"), "train")
    [saved] = (tmp_path / "run").iterdir()
    forge_table(saved, lambda header: header["splits"]["val"].update(size_bytes=float("inf")))
    found = load_splits(config, str(tmp_path / "run"), "train")
    assert "scanning --data.root again" in caplog.text
    for split in ("train", "val"):
        assert_equal(found[split], expected[split])


def test_a_run_without_a_checkpoint_takes_the_images_as_they_are(
    cache: Path, tmp_path: Path
) -> None:
    root = put(str(tmp_path / "set"), {f"{name}/{i}.png": PNG for name in "ab" for i in range(3)})
    config, run = DataConfig(root=root, val_fraction=0), str(tmp_path / "run")
    load_splits(config, run, "train", use_saved=False)
    (tmp_path / "set" / "a" / "new.png").write_bytes(PNG)
    assert len(load_splits(config, run, "train")["train"]) == 6
    assert len(load_splits(config, run, "train", use_saved=False)["train"]) == 7
    assert len(load_splits(config, run, "train")["train"]) == 7
