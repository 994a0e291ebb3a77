"""The table's formats hold the same values, whatever they are, and the same bytes each time."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest

from lightship.errors import ConfigError
from lightship.predict.table import COLUMNS, Prediction, Table, check_format

FORMULA = re.compile(r"'+[=+\-@\t\r\n\0\uff1d\uff0b\uff0d\uff20]")
ENDINGS = ("csv", "jsonl", "parquet")
AWKWARD = [
    Prediction("a.png", [("cat", 0.75), ("dog", 0.25)]),
    Prediction('quote" comma, semi;.png', [('say "cat", loudly', 1.0)]),
    Prediction("line\nbreak\r\n.png", [("two\nlines", 0.999999), ("", 1e-06)]),
    Prediction("späce ünd 漢字 🐈.png", [("ねこ", 0.5), ("dog: a, b", 0.5)]),
    Prediction("'=1+1", [("'", 0.4), ("''@x", 0.3)]),
    Prediction("\t=1", [("@SUM(A1)", 0.4), ("+1", 0.3), ("\r=1", 0.2), ("\uff1d1+1", 0.1)]),
    Prediction("=1+1", [("-1", 0.333333), ("0", 0.333333), ("null", 0.333333)]),
]


def written(folder: Path, name: str, rows: list[Prediction], at_once: int = 2) -> Path:
    path = folder / "made here"
    with Table(path, f"s3://somewhere/{name}") as table:
        for first in range(0, len(rows), at_once):
            table.add(rows[first : first + at_once])
    return path.rename(folder / name)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, as pyarrow reads them."""
    if path.suffix == ".csv":
        newlines = pyarrow.csv.ParseOptions(newlines_in_values=True)
        text = {"class": pyarrow.string(), "path": pyarrow.string()}
        kept = pyarrow.csv.ConvertOptions(column_types=text)
        rows = pyarrow.csv.read_csv(path, parse_options=newlines, convert_options=kept).to_pylist()
        return [without_apostrophes({**row, "top5": json.loads(row["top5"])}) for row in rows]
    if path.suffix == ".jsonl":
        return pyarrow.json.read_json(path).to_pylist()
    return pyarrow.parquet.read_table(path).to_pylist()


def without_apostrophes(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a CSV table, as docs/predict.md says how to read one."""
    names = {key: row[key] for key in ("path", "class")}
    return row | {key: text[1:] if FORMULA.match(text) else text for key, text in names.items()}


def test_no_cell_of_a_csv_table_is_a_formula(tmp_path: Path) -> None:
    with written(tmp_path, "t.csv", AWKWARD).open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    signs = [*"=+-@\t\r\n\0\uff1d\uff0b\uff0d\uff20"]
    assert not [cell for cell in cells if cell[:1] in signs]
    assert "'=1+1" in cells


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(ending: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"table.{ending}", AWKWARD)
    found = read(path)
    assert [tuple(row) for row in found] == [COLUMNS] * len(AWKWARD)
    assert [
        (
            row["path"],
            (row["class"], row["probability"]),
            [(best["class"], best["probability"]) for best in row["top5"]],
        )
        for row in found
    ] == [(row.path, row.top5[0], row.top5) for row in AWKWARD]
    again = written(tmp_path, f"again.{ending}", AWKWARD, at_once=5)
    assert again.read_bytes() == path.read_bytes()


def test_all_formats_hold_the_same(tmp_path: Path) -> None:
    tables = [read(written(tmp_path, f"t.{ending}", AWKWARD)) for ending in ENDINGS]
    assert tables[0] == tables[1] == tables[2]


def test_plain_python_reads_the_text_formats(tmp_path: Path) -> None:
    with written(tmp_path, "t.csv", AWKWARD).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = written(tmp_path, "t.jsonl", AWKWARD).read_text(encoding="utf-8").split("\n")
    objects = [json.loads(line) for line in lines[:-1]]
    for row in rows:
        row |= {"probability": float(row["probability"]), "top5": json.loads(row["top5"])}
    assert list(map(without_apostrophes, rows)) == objects


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_without_rows(ending: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"table.{ending}", [])
    assert path.read_bytes() == b"" if ending == "jsonl" else read(path) == []


def test_row_groups_do_not_follow_the_parts(tmp_path: Path) -> None:
    rows = [Prediction(f"{i}.png", [("cat", 1.0)]) for i in range(70_000)]
    path = written(tmp_path, "t.parquet", rows, at_once=1024)
    metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [65_536, 4_464]


@pytest.mark.parametrize("url", ["table", "table.txt", "s3://bucket/csv", "t.csv.gz", ".csv/t"])
def test_wrong_endings(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--predictions .*\.parquet, \.csv, \.jsonl"):
        check_format(url, "--predictions")


def test_endings_may_be_upper_case(tmp_path: Path) -> None:
    check_format("TABLE.CSV", "--predictions")
    assert written(tmp_path, "T.CSV", AWKWARD).read_text().startswith("path,class")
