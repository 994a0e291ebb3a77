"""Tables of predictions: what a row holds, and the formats: CSV, JSON lines, Parquet.

Every format has the columns path, class, probability and top5, which is a list of {class,
probability}, and reads back as the same values; the same rows make the same bytes. Knows no
storage: a table is made in a local file.
"""

import csv
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from lightship.errors import ConfigError
from lightship.extras import INSTALL
from lightship.safe_text import csv_cell

COLUMNS = ("path", "class", "probability", "top5")
_ROWS_PER_GROUP = 2**16


class Prediction(NamedTuple):
    """One image's row.

    Attributes:
        path: Of the image, relative to the data's root.
        top5: (class, probability) of the likeliest classes, best first; the best is the row's own.
            Empty: the net's output is not finite, so class and probability are null.
    """

    path: str
    top5: list[tuple[str, float]]


def check_format(url: str, flag: str) -> None:
    """Raise ConfigError, naming `flag`, if no table can be written under this name. Reads nothing.

    Args:
        url: Of the table.
        flag: The flag that has it.
    """
    if _ending(url) is None:
        raise ConfigError(
            f"{flag} {url}: the name must end in one of {', '.join(_WRITERS)}, which says the "
            "table's format"
        )
    if _ending(url) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{flag} {url}: Parquet needs pyarrow: {INSTALL['parquet']}")


class Table:
    """A table being written, of the format that its name's ending says: `with Table(...) as table`.

    Args:
        path: Local file that is written; its name does not matter.
        url: What the table will be called (see `check_format`).
    """

    def __init__(self, path: Path, url: str) -> None:
        ending = _ending(url)
        assert ending is not None, "check_format has been called"
        self._writer = _WRITERS[ending](path)

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, rows: Iterable[Prediction]) -> None:
        """Append rows. Memory holds these and at most 65,536 before them."""
        self._writer.add(rows)


class _Writer(Protocol):
    def __init__(self, path: Path) -> None: ...

    def add(self, rows: Iterable[Prediction]) -> None: ...

    def close(self) -> None: ...


def _values(row: Prediction) -> dict[str, Any]:
    """A row as the formats hold it."""
    top5 = [{"class": name, "probability": share} for name, share in row.top5]
    best = top5[0] if top5 else {"class": None, "probability": None}
    return {"path": row.path, **best, "top5": top5}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Csv:
    """The column top5 holds JSON. Texts are `csv_cell`s: no formula for a spreadsheet."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(COLUMNS)

    def add(self, rows: Iterable[Prediction]) -> None:
        for values in map(_values, rows):
            path, name, share = list(values.values())[:3]
            cells = [csv_cell(text) if text is not None else None for text in (path, name)]
            self._rows.writerow([*cells, share, _json(values["top5"])])

    def close(self) -> None:
        self._file.close()


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")

    def add(self, rows: Iterable[Prediction]) -> None:
        self._file.writelines(f"{_json(_values(row))}\n" for row in rows)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """A row group has 65,536 rows, however they come."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        best = [("class", pyarrow.string()), ("probability", pyarrow.float64())]
        top5 = ("top5", pyarrow.list_(pyarrow.struct(best)))
        self._schema = pyarrow.schema([("path", pyarrow.string()), *best, top5])
        self._table = pyarrow.Table
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._waiting: list[dict[str, Any]] = []

    def add(self, rows: Iterable[Prediction]) -> None:
        for row in rows:
            self._waiting.append(_values(row))
            if len(self._waiting) == _ROWS_PER_GROUP:
                self._write_group()

    def _write_group(self) -> None:
        self._file.write_table(self._table.from_pylist(self._waiting, self._schema))
        self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self._write_group()
        self._file.close()


_WRITERS: dict[str, type[_Writer]] = {".parquet": _Parquet, ".csv": _Csv, ".jsonl": _JsonLines}


def _ending(url: str) -> str | None:
    """The known ending of a name, or None."""
    return next((ending for ending in _WRITERS if url.lower().endswith(ending)), None)
