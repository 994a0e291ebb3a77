"""The table of samples: saving, taking parts, and what is held out for validation."""

import contextlib
import dataclasses
import io
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship import storage
from lightship.data.manifest import Manifest, load_manifests, save_manifests, split_validation
from lightship.errors import DataError
from lightship.versions import NewerVersion

COLUMNS = ("file_index", "offset", "length", "label", "crc32")


def manifest_of(labels: list[int], root: str = "s3://bucket/set", classes: int = 0) -> Manifest:
    """Three samples a file; sample i has offset 1000 * i, so that it can be told apart."""
    n = len(labels)
    return Manifest(
        root=root,
        files=[f"dir/file-{i}.tar" for i in range(-(-n // 3))],
        file_index=(np.arange(n) // 3).astype(np.int32),
        offset=1000 * np.arange(n),
        length=np.arange(n) + 5,
        label=np.array(labels, dtype=np.int64),
        crc32=np.where(np.arange(n) % 2, 2**32 - 1, -1),
        class_names=[f"class {i}" for i in range(classes or max(labels) + 1)],
        container="bytes",
        encoding="image",
    )


def assert_same(a: Manifest, b: Manifest) -> None:
    for column in COLUMNS:
        x, y = getattr(a, column), getattr(b, column)
        assert x.dtype.kind == "i" or x.dtype.itemsize < 8, column  # uint64 makes fractions of sums
        np.testing.assert_array_equal(x, y)
    for name in ("root", "files", "class_names", "container", "encoding"):
        assert getattr(a, name) == getattr(b, name)


def test_saved_manifests_come_back_the_same(tmp_path):
    saved = {"train": manifest_of([0, 1, -1, 1, 2]), "test": manifest_of([2, 2], classes=3)}
    url = str(tmp_path / "data" / "manifest.npz")
    save_manifests(url, saved)
    loaded = load_manifests(url)
    assert list(loaded) == ["train", "test"]
    for split in saved:
        assert_same(loaded[split], saved[split])


def test_a_large_manifest_is_saved_in_a_few_bytes_a_sample():
    n = 200_000
    labels = np.arange(n) // 200
    large = dataclasses.replace(
        manifest_of([0]),
        files=[f"train/n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels)],
        file_index=np.arange(n, dtype=np.int32),
        offset=np.zeros(n, dtype=np.int64),
        length=np.random.default_rng(0).integers(20_000, 200_000, n),
        label=labels,
        crc32=np.full(n, -1),
        class_names=[str(i) for i in range(1000)],
    )
    save_manifests("memory://large.npz", {"train": large})
    assert storage.size_bytes("memory://large.npz") < 12 * n
    assert_same(load_manifests("memory://large.npz")["train"], large)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", "cut", "changed", "pickle"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    url = str(tmp_path / "m.npz")
    save_manifests(url, {"train": manifest_of([0, 1])})
    whole = storage.read_bytes(url)
    if damage == "cut":
        damage = whole[: len(whole) // 2]
    elif damage == "changed":  # a valid .npz whose table is not what was saved
        arrays = dict(np.load(io.BytesIO(whole)))
        arrays["train.label"] = arrays["train.label"][::-1]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        damage = buffer.getvalue()
    elif damage == "pickle":
        buffer = io.BytesIO()
        np.savez(buffer, header=np.array([{"format": 1}], dtype=object))
        damage = buffer.getvalue()
    storage.write_bytes(url, damage)
    with pytest.raises(DataError, match=r"m\.npz"):
        load_manifests(url)


def saved_as(url: str, header: Any, **arrays: np.ndarray) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(raw, dtype=np.uint8), **arrays)
    storage.write_bytes(url, buffer.getvalue())


@pytest.mark.parametrize("splits", [{}, {"train": "of another kind"}, None])
def test_a_newer_version_is_refused_by_its_version(tmp_path, splits):
    url = str(tmp_path / "m.npz")
    saved_as(url, {"format": 2, "splits": splits})
    with pytest.raises(NewerVersion, match=r"m\.npz has version 2 .*upgrade lightship"):
        load_manifests(url)


WRONG_HEADERS: dict[str, Any] = {
    "a list": [1],
    "text": "x",
    "null": None,
    "without splits": {"format": 1},
    "no split": {"format": 1, "splits": {}},
    "splits are a list": {"format": 1, "splits": [1]},
    "a split is text": {"format": 1, "splits": {"train": "x"}},
    "a split that has no table": {"format": 1, "splits": {"val": {}}},
    "not UTF-8": b"\xff\xfe",
    "nested": b"[" * 100_000,
}
WRONG_ABOUT: dict[str, Any] = {
    "root": 1, "class_names": ["a", 1], "container": "zip", "encoding": ["image"],
    "fingerprint": None,
}  # fmt: skip
WRONG_COLUMNS: dict[str, tuple[str, Any]] = {
    "negative offset": ("offset", [0, -1, 5]),
    "negative length": ("length", [-5, 1, 5]),
    "offset above int64": ("offset", np.array([0, 2**64 - 1, 5], dtype=np.uint64)),
    "label out of range": ("label", [0, 1, 3]),
    "label below -1": ("label", [0, 1, -2]),
    "label above int64": ("label", np.array([0, 2**64 - 1, 5], dtype=np.uint64)),
    "no such file": ("file_index", [0, 0, 1]),
    "negative file": ("file_index", [0, 0, -1]),
    "fractions": ("length", [1.5, 1.0, 2.0]),
    "text": ("label", ["a", "b", "c"]),
    "two axes": ("label", [[0], [1], [2]]),
    "one sample less": ("crc32", [-1, -1]),
    "files not UTF-8": ("files", np.array([255, 254], dtype=np.uint8)),
}


def parts_of(manifest: Manifest) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    about = {name: getattr(manifest, name) for name in ("root", "class_names", "container")}
    arrays = {f"train.{column}": getattr(manifest, column) for column in COLUMNS}
    arrays["train.files"] = np.frombuffer("\0".join(manifest.files).encode(), dtype=np.uint8)
    about |= {"encoding": manifest.encoding, "fingerprint": manifest.fingerprint()}
    return about, arrays


def test_a_file_of_these_parts_is_read(tmp_path):
    about, arrays = parts_of(manifest_of([0, 1, 2]))
    url = str(tmp_path / "m.npz")
    saved_as(url, {"format": 1, "splits": {"train": about}, "new": 1}, **arrays)
    assert_same(load_manifests(url)["train"], manifest_of([0, 1, 2]))


@pytest.mark.parametrize("case", [*WRONG_HEADERS, *WRONG_ABOUT, *WRONG_COLUMNS])
def test_what_no_scan_makes_is_refused_even_with_its_fingerprint(tmp_path, case):
    table = manifest_of([0, 1, 2])
    about, arrays = parts_of(table)
    if case in WRONG_ABOUT:
        about[case] = WRONG_ABOUT[case]
    if case in WRONG_COLUMNS:
        column, values = WRONG_COLUMNS[case]
        arrays[f"train.{column}"] = np.asarray(values)
        with contextlib.suppress(Exception):  # no fingerprint of text
            changed = dataclasses.replace(table, **{column: np.asarray(values)})
            about["fingerprint"] = changed.fingerprint()
    url = str(tmp_path / "m.npz")
    header = WRONG_HEADERS.get(case, {"format": 1, "splits": {"train": about}})
    saved_as(url, header, **arrays)
    with pytest.raises(DataError, match=r"m\.npz") as error:
        load_manifests(url)
    assert len(str(error.value)) < 400


def test_splits_of_different_classes_are_refused(tmp_path):
    url, table = str(tmp_path / "m.npz"), manifest_of([0, 1, 2])
    other = dataclasses.replace(table, class_names=["class 1", "class 0", "class 2"])
    save_manifests(url, {"train": table, "test": other})
    with pytest.raises(DataError, match="splits of different classes"):
        load_manifests(url)


def test_damaged_bytes_are_refused(tmp_path):
    url, rng = str(tmp_path / "m.npz"), random.Random(0)
    save_manifests(url, {"train": manifest_of([0, 1, 2] * 9)})
    whole = storage.read_bytes(url)
    for _ in range(200):
        changed = bytearray(whole)
        for place in rng.sample(range(len(whole)), 2):
            changed[place] = rng.randrange(256)
        storage.write_bytes(url, bytes(changed))
        with contextlib.suppress(DataError, NewerVersion):
            assert_same(load_manifests(url)["train"], manifest_of([0, 1, 2] * 9))


def test_take_keeps_the_asked_order_and_only_the_files_it_needs():
    part = manifest_of([0, 1, 2, 0, 1, 2, 0]).take([6, 0, 1])
    assert part.offset.tolist() == [6000, 0, 1000]
    assert [part.files[i] for i in part.file_index] == [
        "dir/file-2.tar",
        "dir/file-0.tar",
        "dir/file-0.tar",
    ]
    assert part.files == ["dir/file-0.tar", "dir/file-2.tar"]
    assert part.class_names == ["class 0", "class 1", "class 2"]


def test_names_tell_the_file_and_the_place_in_it():
    table = manifest_of([0, 1])
    assert [table.name(0), table.name(1)] == ["dir/file-0.tar", "dir/file-0.tar#1000"]
    rows = dataclasses.replace(table, container="parquet")
    assert rows.name(0) == "dir/file-0.tar#0"
    single = dataclasses.replace(table, root="s3://bucket/one.tar", files=[""])
    assert single.name(1) == "one.tar#1000"
    assert single.url(0) == "s3://bucket/one.tar"


def test_fingerprint_ignores_the_root_alone():
    table = manifest_of([0, 1, 2])
    same = dataclasses.replace(table, root="elsewhere")
    assert same.fingerprint() == table.fingerprint()
    changed = [
        dataclasses.replace(table, **{column: getattr(table, column)[::-1] + 1})
        for column in COLUMNS
    ]
    changed += [
        dataclasses.replace(table, files=["other"]),
        dataclasses.replace(table, class_names=["a", "b", "c"]),
        dataclasses.replace(table, container="gzip"),
        dataclasses.replace(table, encoding="raw:3x32x32"),
    ]
    prints = {each.fingerprint() for each in changed}
    assert len(prints) == len(changed)
    assert table.fingerprint() not in prints


labels_strategy = st.lists(st.integers(0, 4), min_size=2, max_size=120)


@given(labels_strategy, st.floats(0.001, 0.9))
def test_validation_is_a_stratified_part_that_leaves_every_class_to_train(labels, fraction):
    table = manifest_of(labels)
    counts = np.bincount(table.label)
    if (counts <= 1).all():
        with pytest.raises(DataError, match=r"--data\.val_fraction"):
            split_validation(table, fraction)
        return
    train, val = split_validation(table, fraction)
    assert val is not None
    ids_train, ids_val = train.offset // 1000, val.offset // 1000
    assert sorted([*ids_train, *ids_val]) == list(range(len(labels)))
    assert (np.diff(ids_train) > 0).all()
    assert (np.diff(ids_val) > 0).all()
    assert len(val) >= 1
    held_out = np.bincount(val.label, minlength=len(counts))
    for count, held in zip(counts, held_out, strict=True):
        assert held <= max(0, count - 1)
        assert abs(held - count * fraction) <= 1
    np.testing.assert_array_equal(train.label, table.label[ids_train])
    again_train, again_val = split_validation(table, fraction)
    assert_same(again_train, train)
    assert_same(again_val, val)


def test_validation_is_not_the_first_of_each_class():
    _, val = split_validation(manifest_of([0] * 500 + [1] * 500), 0.1)
    assert len(val) == 100
    ids = val.offset // 1000
    assert 150 < ids[val.label == 0].mean() < 350
    assert ids[:10].tolist() == [2, 3, 8, 30, 33, 36, 43, 47, 69, 71]  # for ever the same


def test_no_validation_at_fraction_0():
    table = manifest_of([0, 1, 1])
    train, val = split_validation(table, 0)
    assert val is None
    assert_same(train, table)
