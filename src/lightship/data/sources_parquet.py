"""Parquet files with images in a column, as the Hugging Face Hub lays them out."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from lightship import storage
from lightship.data.sources_parts import Found, Label, Part
from lightship.data.sources_splits import splits_of_files
from lightship.exits import ConfigError, DataError, LightshipError

_LABEL_COLUMNS = ("label", "fine_label", "labels")
_IMAGE_COLUMNS = ("image", "img")
_SCAN_THREADS = 8


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "--data.root holds Parquet, which needs pyarrow: pip install lightship[parquet]"
        ) from error
    return pyarrow


@contextmanager
def _damage_is_the_datas(name: str) -> Iterator[None]:
    try:
        yield
    except LightshipError:
        raise
    except (_pyarrow().ArrowException, OSError) as error:
        raise DataError(f"{name} is damaged or not Parquet: {error}") from error


def _open(url: str, name: str) -> Any:
    with _damage_is_the_datas(name):
        return _pyarrow().parquet.ParquetFile(storage.open_binary(url), pre_buffer=True)


def _image_column(schema: Any, name: str) -> str:
    """The column path that holds image bytes: a struct with `bytes`, or binary by its name."""
    types = _pyarrow().types
    structs = [
        field.name
        for field in schema
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    for column in sorted(structs, key=lambda column: column not in _IMAGE_COLUMNS):
        return f"{column}.bytes"
    for field in schema:
        binary = types.is_binary(field.type) or types.is_large_binary(field.type)
        if field.name in _IMAGE_COLUMNS and binary:
            return str(field.name)
    raise DataError(
        f"{name} has no column of image bytes (struct<bytes, path>, or binary named "
        f"{' or '.join(_IMAGE_COLUMNS)}); its columns: {', '.join(schema.names)}"
    )


def _class_names(schema: Any, column: str) -> list[str] | None:
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None


def scan_parquet(root_url: str, files: Sequence[str], root: str, labelled: bool = True) -> Found:
    """Rows of every file, in order; labels and class names as `sources.scan` says. Rank 0; blocks.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: A file is damaged, or has no image or label column.
    """
    named = [file or storage.base_name(root_url) for file in files]
    splits = splits_of_files(named, root) if labelled else None

    def scan_one(job: tuple[int, str]) -> tuple[Part, list[str] | None]:
        i, file = job
        name = file or root
        parquet = _open(storage.join(root_url, file) if file else root_url, name)
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        column = _image_column(schema, name)
        labels: Sequence[Label] = [None] * rows
        names = None
        if labelled:
            label_column = next((c for c in _LABEL_COLUMNS if c in schema.names), None)
            if label_column is None:
                raise DataError(f"{name} has no column {', '.join(_LABEL_COLUMNS)}; its columns: "
                                f"{', '.join(schema.names)}")  # fmt: skip
            with _damage_is_the_datas(name):
                labels = parquet.read([label_column])[label_column].to_pylist()
            wrong = [x for x in labels if x is not None and type(x) not in (int, str)]
            if wrong:
                raise DataError(f"{name}: the label {wrong[0]!r} is neither a number nor text")
            names = _class_names(schema, label_column)
            if labels and all(label == -1 for label in labels):  # what the Hub writes for unknown
                labels = [None] * rows
        lengths = _mean_lengths(parquet.metadata, column)
        part = Part(
            splits[i] if splits else "train",
            [file],
            np.zeros(rows, dtype=np.int32),
            np.arange(rows),
            lengths,
            labels,
        )
        return part, names

    _pyarrow()
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scanned = list(pool.map(scan_one, enumerate(files)))
    names = next((names for _, names in scanned if names), None)
    return Found([part for part, _ in scanned], "parquet", class_names=names)


def _mean_lengths(metadata: Any, column: str) -> np.ndarray:
    lengths = []
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        sizes = {
            group.column(c).path_in_schema: group.column(c).total_uncompressed_size
            for c in range(group.num_columns)
        }
        lengths.append(np.full(group.num_rows, sizes[column] // max(1, group.num_rows)))
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)


class RowReader:
    """Image bytes of one file's rows; keeps the newest row group. For one thread; blocks."""

    def __init__(self, url: str):
        self._file = _open(url, storage.base_name(url))
        self._column = _image_column(self._file.schema_arrow, storage.base_name(url))
        metadata = self._file.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._first_rows = np.cumsum([0, *sizes])
        self._group = -1
        self._images: Any = None

    def read(self, row: int, length: int) -> bytes:
        """The bytes in a row, whatever the estimated length. Raises DataError where none are."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if row >= self._first_rows[-1]:
            raise DataError(f"the file has only {self._first_rows[-1]} rows: truncated or replaced")
        if group != self._group:
            with _damage_is_the_datas(f"row group {group}"):
                self._images = self._file.read_row_group(group, columns=[self._column]).column(0)
            self._group = group
        value = self._images[row - int(self._first_rows[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DataError("the row holds no image bytes")
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
