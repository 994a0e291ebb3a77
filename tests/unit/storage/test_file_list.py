"""The names of files in one text."""

import pickle
import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.storage.file_list import FileList

names = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))


@given(names)
def test_as_a_list(plain: list[str]) -> None:
    files = FileList.of(plain)
    assert files == plain
    assert list(files) == plain
    assert [files[i] for i in range(-len(plain), len(plain))] == 2 * plain
    assert files[1:3] == plain[1:3]
    assert pickle.loads(pickle.dumps(files)) == files
    if plain:
        assert FileList.from_text("\0".join(plain).encode()) == files
    with pytest.raises(IndexError):
        files[len(plain)]


@given(names, st.randoms(use_true_random=False))
def test_some_of_a_list(plain: list[str], random: Random) -> None:
    """Of neighbours the text is shared; the list can still be sent to another process."""
    for first, end in ((0, len(plain)), (1, len(plain) - 1), (1, 1)):
        inner = [first <= i < end for i in range(len(plain))]
        mixed = [is_inner and random.random() < 0.7 for is_inner in inner]
        for keep in (inner, mixed):
            some = FileList.of(plain).select(np.array(keep, dtype=bool))
            kept = [name for name, is_kept in zip(plain, keep, strict=True) if is_kept]
            assert some == kept
            assert some.is_whole()
            assert FileList.of(kept) == some == pickle.loads(pickle.dumps(some))


def test_a_lone_surrogate_is_kept() -> None:
    assert list(FileList.of(["a\udce9", "b"])) == ["a\udce9", "b"]


def test_a_name_may_hold_a_zero_byte() -> None:
    assert list(FileList.of(["a\0b", "", "c"])) == ["a\0b", "", "c"]


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        FileList.from_text(b"a\0\xff")


def test_names_are_held_in_their_bytes() -> None:
    """300,000 names of 27 bytes: as a list of str they take 25 MB."""
    tracemalloc.start()
    try:
        files = FileList.of(f"train/{i // 1000:06d}/{i:09d}.jpg" for i in range(300_000))
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert files[299_999] == "train/000299/000299999.jpg"
    assert held_bytes < 11e6
    assert peak_bytes < 35e6
