"""The table is put together without ever being in memory."""

import json
import tracemalloc
from pathlib import Path

import pyarrow.parquet
import pytest

from lightship.commands.predict import _make_table
from lightship.config import DataConfig
from lightship.errors import ConfigError, DataError
from lightship.predict.shards import PART_IMAGES, Division, Parts, Row, Unreadable
from lightship.predict.table import Prediction, Table

CLASSES = [f"a class with a name of its own {i}" for i in range(5)]
TOP5 = [(name, 0.2) for name in CLASSES]


def parts_of(folder: Path, num_parts: int, bad: int = 0) -> tuple[Parts, str]:
    """All parts of a table, whose first `bad` images could not be read, and the table's URL."""
    url = str(folder / "table")
    division = Division(num_parts * PART_IMAGES, PART_IMAGES)
    parts = Parts(url, {}, division, str, CLASSES)
    parts.open()
    for number in range(num_parts):
        rows: list[Row] = [
            Unreadable(f"{i}", f"{i} is empty") if i < bad else Prediction(f"{i}", TOP5)
            for i in division.ids(number)
        ]
        parts.write(number, rows)
    return parts, url


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, ending: str) -> None:
    parts, _ = parts_of(tmp_path, 60)
    tracemalloc.start()
    try:
        with Table(tmp_path / "made here", f"table{ending}") as table:
            for rows in parts.read():
                table.add(row for row in rows if isinstance(row, Prediction))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < (tmp_path / "made here").stat().st_size / 3


@pytest.mark.parametrize(
    ("on_error", "fraction", "told"),
    [
        ("raise", 1.0, "on_error skip"),
        ("skip", 0.01, "max_bad_fraction 0.01 allows no more than 10"),
        ("skip", 0.0, "allows no more than 0"),
    ],
)
def test_too_many_unreadable(tmp_path: Path, on_error: str, fraction: float, told: str) -> None:
    """Also of parts that were made when more were allowed: they are counted over the whole."""
    parts, url = parts_of(tmp_path, 1, bad=11)
    config = DataConfig(on_error=on_error, max_bad_fraction=fraction)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"^11 of 1024 images cannot be read.*{told}"):
        _make_table(f"{url}.csv", parts, config)
    assert not Path(f"{url}.csv").exists()
    assert parts.open().keys() == {0}, "the parts stay"


def test_unreadable_are_left_out(tmp_path: Path) -> None:
    parts, url = parts_of(tmp_path, 1, bad=11)
    config = DataConfig(on_error="skip", max_bad_fraction=0.011)
    rows, unreadable, not_finite = _make_table(f"{url}.csv", parts, config)
    assert (rows, len(unreadable), not_finite) == (1024 - 11, 11, [])
    assert len(Path(f"{url}.csv").read_text().splitlines()) == 1024 - 11 + 1


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_outputs_that_are_not_finite_have_no_class(tmp_path: Path, ending: str) -> None:
    url = str(tmp_path / f"table{ending}")
    parts = Parts(url, {}, Division(2, PART_IMAGES), ["good.png", "none.png"].__getitem__, CLASSES)
    parts.open()
    parts.write(0, [Prediction("good.png", TOP5), Prediction("none.png", [])])
    assert _make_table(url, parts, DataConfig()) == (2, [], ["none.png"])
    if ending == ".csv":
        assert Path(url).read_text().splitlines()[-1] == "none.png,,,[]"
        return
    if ending == ".jsonl":
        rows = [json.loads(line) for line in Path(url).read_text().splitlines()]
    else:
        rows = pyarrow.parquet.read_table(url).to_pylist()
    assert rows[1] == {"path": "none.png", "class": None, "probability": None, "top5": []}
    assert rows[0]["class"] == TOP5[0][0]


def test_a_table_without_any_class_is_refused(tmp_path: Path) -> None:
    parts = Parts(
        str(tmp_path / "t.csv"), {}, Division(1, PART_IMAGES), ["none.png"].__getitem__, CLASSES
    )
    parts.open()
    parts.write(0, [Prediction("none.png", [])])
    with pytest.raises(ConfigError, match=r"not finite for any image.*--ckpt_path"):
        _make_table(str(tmp_path / "t.csv"), parts, DataConfig())
    assert not (tmp_path / "t.csv").exists()
