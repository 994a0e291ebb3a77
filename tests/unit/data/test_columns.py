"""Columns of integers in one file that is mapped."""

import io
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lightship.data.columns import TRAILER_BYTES, Columns, ColumnWriter, Pieces
from lightship.errors import DataError
from lightship.versions import NewerVersion


def written(path: Path, **columns: np.ndarray) -> Path:
    with path.open("wb") as file:
        out = ColumnWriter(file)
        for name, values in columns.items():
            out.add(name, Pieces(values))
        out.finish({"more": 1})
    return path


def with_header(path: Path, change: dict[str, object]) -> Path:
    """The file with another header, and the trailer that goes with it."""
    columns = Columns(path)
    content = path.read_bytes()[: columns._end]
    out = ColumnWriter(file := io.BytesIO())
    out._put(content)
    out._columns = columns.header["columns"]
    out.finish(change)
    path.write_bytes(file.getvalue())
    return path


RANGES = [
    (0, 255, "u1"), (-1, 127, "i1"), (0, 65535, "u2"), (-1, 999, "i2"), (0, 2**32 - 1, "u4"),
    (-1, 2**31 - 1, "i4"), (-1, 2**32 - 1, "i8"), (0, 2**32, "i8"),
]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "kind"), RANGES)
def test_a_column_is_as_narrow_as_its_values(tmp_path: Path, low: int, high: int, kind: str):
    values = np.array([low, high, low], dtype=np.int64)
    columns = Columns(written(tmp_path / "c", first=np.arange(3), values=values))
    assert columns.read("values").dtype == np.dtype(kind)
    assert columns.read("values").tolist() == values.tolist()
    assert columns.read("first").tolist() == [0, 1, 2]
    assert columns.header["more"] == 1
    columns.check_content()


def test_equal_values_take_no_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "c", same=np.full(10**6, -1), none=np.arange(0))
    assert path.stat().st_size < 1000
    same = Columns(path).read("same")
    assert len(same) == 10**6
    assert same[[0, 999_999]].tolist() == [-1, -1]
    assert not Columns(path).read("none").size


def test_many_pieces_come_back_and_are_written_in_the_memory_of_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**40, 3 * 10**6)
    tracemalloc.start()
    columns = Columns(written(tmp_path / "c", odd=values[:7].astype(np.uint8), values=values))
    columns.check_content()
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    np.testing.assert_array_equal(columns.read("values"), values)


@pytest.mark.parametrize("size", [0, 1, TRAILER_BYTES - 1, TRAILER_BYTES, -TRAILER_BYTES, -1])
def test_a_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "c", values=np.arange(1000))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=str(path)):
        Columns(path)


def test_a_file_whose_beginning_is_lost_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "c", values=np.arange(1000))
    path.write_bytes(path.read_bytes()[1500:])
    with pytest.raises(DataError, match="column values"):
        Columns(path).read("values")


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "c", values=np.arange(1000), more=np.arange(50))
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises((DataError, NewerVersion)):
            Columns(path).check_content()


@pytest.mark.parametrize(
    "about",
    [
        {"type": "f8", "count": 3, "start": 0}, {"type": "u1", "count": 3, "start": 1},
        {"type": "u1", "count": 10**6, "start": 0}, {"type": "i8", "count": 251, "start": 0},
        {"type": "u1", "count": -1, "start": 0}, {"type": "u1", "count": 1, "start": 2**40},
        {"type": "u1", "count": 1, "start": -64}, {"type": "u1", "count": True, "start": 0},
        {"value": 1, "count": 2**21}, {"value": "x", "count": 2}, {"value": 2**70, "count": 2},
        {"type": ["u1"], "count": 1, "start": 0}, {}, [], None, 1,
    ],
)  # fmt: skip
def test_a_column_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, about) -> None:
    path = written(tmp_path / "c", values=np.arange(1000))
    rest = {"type": "u2", "count": 1000, "start": 0}  # for which the bytes are there
    with_header(path, {"columns": {"values": about, "rest": rest}})
    with pytest.raises(DataError, match="column values"):
        Columns(path).read("values")


@pytest.mark.parametrize("columns", [[], None, 1])
def test_a_header_of_another_form_is_refused(tmp_path: Path, columns) -> None:
    path = written(tmp_path / "c", values=np.arange(1000))
    with pytest.raises(DataError, match="header"):
        Columns(with_header(path, {"columns": columns}))


def test_a_newer_version_is_refused_by_its_version(tmp_path: Path) -> None:
    path = written(tmp_path / "c", values=np.arange(1000))
    path.write_bytes(path.read_bytes().replace(b"columns 1 ", b"columns 2 "))
    with pytest.raises(NewerVersion, match=r"has version 2 .*upgrade lightship"):
        Columns(path)
