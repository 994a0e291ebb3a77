"""The compact table of a listing is the sorted dict that it stands for."""

import logging
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.storage import file_list, file_table
from lightship.storage.file_table import FileTable, FileTableBuilder

paths = st.text(st.sampled_from("aAz-./ 09\u00e9\udce9\uffee\U0001f600"), max_size=6)
listings = st.lists(st.tuples(paths, st.integers(0, 2**62)), max_size=60)


@given(listings, st.integers(1, 9), st.integers(1, 9))
def test_as_a_sorted_dict(files: list[tuple[str, int]], block: int, sampled: int) -> None:
    """Whatever the order of the files, and however the blocks overlap; the last of two counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_table, "_BLOCK", block * sampled)
        patch.setattr(file_table, "_SAMPLED", sampled)
        patch.setattr(file_list, "_AT_ONCE", 3)
        builder = FileTableBuilder()
        for path, size_bytes in files:
            builder.add(path, size_bytes)
        assert len(builder) == len(files)
        table, plain = builder.finish(), dict(sorted(dict(files).items()))
        assert list(table) == list(plain)
        assert table.sizes.tolist() == list(plain.values())
        assert table == plain == FileTable.of(plain)
        assert "b" not in table
        keep = table.mask(lambda path: "a" in path)
        assert table.select(keep) == {path: n for path, n in plain.items() if "a" in path}
        assert table.select(~keep) == {path: n for path, n in plain.items() if "a" not in path}


def test_pipes_are_kept_apart() -> None:
    builder = FileTableBuilder()
    builder.add("b", 1)
    for path in ("c", "a", "c"):
        builder.add_special(path)
    table = builder.finish()
    assert (dict(table), table.special) == ({"b": 1}, ("a", "c"))


def test_files_in_no_order_take_little_more_than_the_table() -> None:
    """100,000 names of 24 bytes, shuffled so that all blocks overlap."""
    count = 100_000
    order = np.random.default_rng(0).permutation(count).tolist()
    builder = FileTableBuilder()
    tracemalloc.start()
    try:
        for i in order:
            builder.add(f"train/{i // 1000:04d}/{i:09d}.jpg", i)
        table = builder.finish()
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert list(table.paths[:2]) == ["train/0000/000000000.jpg", "train/0000/000000001.jpg"]
    assert (np.diff(table.sizes) == 1).all()
    assert held_bytes < 45 * count
    assert peak_bytes < 160 * count


def test_a_long_listing_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    monkeypatch.setattr(file_table, "_BLOCK", 2)
    monkeypatch.setattr(file_table, "_SAMPLED", 1)
    monkeypatch.setattr(file_table, "time", SimpleNamespace(monotonic=lambda: now_s))
    builder = FileTableBuilder("s3://bucket/images")
    with caplog.at_level(logging.INFO, "lightship.storage"):
        for number in range(40):  # two a block, one a second
            now_s += 1.0
            builder.add(f"{number}.jpg", 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"listing s3://bucket/images: {count} files so far" for count in (10, 20, 30, 40)
    ]
    assert len(builder.finish()) == 40
