"""The table of samples: taking parts, names and the fingerprint."""

import dataclasses

import numpy as np

from lightship.data.manifest import Manifest

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
