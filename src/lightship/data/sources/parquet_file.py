"""One Parquet file: its columns of images and labels, and the image bytes of its rows."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightship import storage
from lightship.data.names import check_class_names, check_label_length
from lightship.data.sources.parquet_footer import RowGroup, read_row_groups
from lightship.data.sources.parts import Label
from lightship.errors import ConfigError, DataError, LightshipError
from lightship.extras import INSTALL
from lightship.storage.bounds import check_unpacked

_LABEL_COLUMNS = ("label", "fine_label", "labels")
_IMAGE_COLUMNS = ("image", "img")
_MAX_LISTED = 20
_TAIL_BYTES = 2**16
_MAX_FOOTER_BYTES = 2**24
_FREE_ROWS = 2**20
"""Rows of any file; beyond them a row has at least a byte."""
_MAX_BUFFERED_BYTES, _BUFFER_BYTES = 2**30, 2**23
_BATCH_BYTES, _MAX_BATCH_ROWS = 2**26, 16
_MAX_FIXED_BYTES = 2**26


def require_pyarrow() -> Any:
    """The package pyarrow. Raises ConfigError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"--data.root holds Parquet, which needs pyarrow: {INSTALL['parquet']}"
        ) from error
    return pyarrow


@contextmanager
def damage_is_the_datas(name: str) -> Iterator[None]:
    """Raise what pyarrow raises on damaged bytes as DataError."""
    try:
        yield
    except LightshipError:
        raise
    except (
        require_pyarrow().ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise DataError(f"{name} is damaged or not Parquet: {error}") from error


@dataclass(frozen=True)
class Opened:
    """An open file."""

    file: Any
    """A `pyarrow.parquet.ParquetFile`."""
    groups: list[RowGroup]
    stream: Any

    def labels(self, column: str) -> list[Label]:
        """A column of numbers or text, [rows]. Blocks.

        Text is read as a dictionary, in which each name stands once, however many rows have it.

        Raises:
            DataError: It unpacks to far more than it may, or a name is too long.
        """
        check_groups(self.groups, column)
        kind, types = self.file.schema_arrow.field(column).type, require_pyarrow().types
        is_text = not (types.is_integer(kind) or types.is_null(kind))
        file = self._file(read_dictionary=[column]) if is_text else self.file
        labels: list[Label] = []
        for chunk in file.read([column])[column].chunks:
            chunk.validate(full=True)  # pyarrow itself checks no index into a dictionary
            if not types.is_dictionary(chunk.type):
                labels += chunk.to_pylist()
                continue
            names = chunk.dictionary.to_pylist()
            for name in names:
                if isinstance(name, str):
                    check_label_length(name, f"the column {column}")
            labels += [None if i is None else names[i] for i in chunk.indices.to_pylist()]
        return labels

    def _file(self, **how: Any) -> Any:
        pq = require_pyarrow().parquet
        return pq.ParquetFile(self.stream, metadata=self.file.metadata, pre_buffer=True, **how)


@contextmanager
def open_parquet(url: str, name: str) -> Iterator[Opened]:
    """A file, closed at the end. Blocks.

    Raises:
        DataError: The file is damaged, also where that shows only while it is used, or says of
            itself what no honest one does.
    """
    pq = require_pyarrow().parquet
    with damage_is_the_datas(name), storage.open_binary(url) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read(_TAIL_BYTES)  # with the footer, which pyarrow then finds in the buffer
        if (footer := int.from_bytes(tail[-8:-4], "little")) > _MAX_FOOTER_BYTES:
            raise DataError(f"{name} has a footer of {footer} bytes; at most {_MAX_FOOTER_BYTES}")
        file = pq.ParquetFile(stream, pre_buffer=True)
        if footer + 8 > len(tail):
            stream.seek(size - footer - 8)
            tail = stream.read(footer + 8)
        groups = read_row_groups(tail[-footer - 8 : -8])
        rows = sum(group.num_rows for group in groups)
        if not 0 <= max(rows, file.metadata.num_rows) <= _FREE_ROWS + size:
            raise DataError(f"{name} is said to have {rows} rows, in {size} bytes")
        chunks = [chunk.packed_bytes for group in groups for chunk in group.chunks.values()]
        if max(chunks, default=0) > _MAX_BUFFERED_BYTES:
            file = pq.ParquetFile(stream, metadata=file.metadata, buffer_size=_BUFFER_BYTES)
        yield Opened(file, groups, stream)


def check_groups(groups: Sequence[RowGroup], column: str) -> None:
    """Raise DataError if a row group of a column unpacks to far more than it may."""
    for g, group in enumerate(groups):
        for path, chunk in group.chunks.items():
            if path.split(".")[0] == column.split(".")[0]:
                what = f"the column {column} of row group {g}"
                check_unpacked(chunk.unpacked_bytes, chunk.packed_bytes, what)


def image_columns(schema: Any, name: str) -> list[str]:
    """The column paths that may hold image bytes, the one to take first.

    A struct with binary `bytes`, as the Hub writes images, or binary by its name.

    Raises:
        DataError: There is none, or two of one name.
    """
    found = []
    for field in schema:
        if require_pyarrow().types.is_struct(field.type):
            inner = field.type.get_field_index("bytes")
            if inner >= 0 and _is_binary(field.type.field(inner).type):
                found.append(f"{field.name}.bytes")
        elif field.name in _IMAGE_COLUMNS and _is_binary(field.type):
            found.append(field.name)
    if not found:
        raise DataError(
            f"{name} has no column of image bytes (struct<bytes: binary, path: string>, or binary "
            f"named {' or '.join(_IMAGE_COLUMNS)}); its columns: {_columns(schema)}"
        )
    found.sort(key=lambda path: path.partition(".")[0] not in _IMAGE_COLUMNS)
    _check_unique(schema, found[0].removesuffix(".bytes"), name)
    return found


def label_columns(schema: Any, name: str) -> list[str]:
    """The columns that may hold labels, the one to take first.

    Raises:
        DataError: There is none, two of one name, or it holds neither whole numbers nor text.
    """
    found = [column for column in _LABEL_COLUMNS if column in schema.names]
    if not found:
        raise DataError(
            f"{name} has no column {', '.join(_LABEL_COLUMNS)}; its columns: {_columns(schema)}"
        )
    _check_unique(schema, found[0], name)
    kind, types = schema.field(found[0]).type, require_pyarrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(kind) or types.is_null(kind) or _is_text(kind)):
        raise DataError(
            f"{name}: the labels in the column {found[0]} are of type {kind}: neither a number "
            "(integer) nor text"
        )
    features = _features(schema, name)
    others = [
        column
        for column in schema.names
        if isinstance(features.get(column), dict) and features[column].get("names") is not None
    ]
    return list(dict.fromkeys([*found, *others]))


def class_names(schema: Any, column: str, name: str) -> list[str] | None:
    """The names that the Hub's metadata give to a column's numbers, if it does.

    Raises:
        DataError: The metadata are damaged, or the names are no list of different names.
    """
    feature = _features(schema, name).get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is None:
        return None
    if not isinstance(names, list):
        raise DataError(f"{name}: the class names of {column} are {names!r:.80}, not a list")
    return check_class_names(names, name)


def _features(schema: Any, name: str) -> dict[str, Any]:
    """Column -> its description by the library `datasets`; empty without one."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        node = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: its metadata 'huggingface' are not JSON: {error}") from error
    for key in ("info", "features"):
        if isinstance(node, dict):
            node = node.get(key)
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise DataError(f"{name}: its metadata 'huggingface' hold no table of features")
    return node


def _is_binary(kind: Any) -> bool:
    types = require_pyarrow().types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or (types.is_fixed_size_binary(kind) and kind.byte_width <= _MAX_FIXED_BYTES)
        or str(kind) == "binary_view"
    )


def _is_text(kind: Any) -> bool:
    types = require_pyarrow().types
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def _check_unique(schema: Any, column: str, name: str) -> None:
    if schema.names.count(column) > 1:
        raise DataError(f"{name} has {schema.names.count(column)} columns called {column}")


def _columns(schema: Any) -> str:
    listed = [f"{field.name} ({field.type})" for field in schema][:_MAX_LISTED]
    rest = len(schema.names) - len(listed)
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


class RowReader:
    """Image bytes of one file's rows, best read in their order. For one thread; blocks.

    Rows are decoded a few at a time: a small dictionary may stand for any number of large images.
    """

    def __init__(self, url: str):
        name = storage.base_name(url)
        with ExitStack() as opened:
            table = opened.enter_context(open_parquet(url, name))
            self._file, groups = table.file, table.groups
            self._column = image_columns(self._file.schema_arrow, name)[0]
            check_groups(groups, self._column)
            self._opened = opened.pop_all()
        self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
        # No image of a row group has more bytes than its column.
        largest = max((group.chunks[self._column].unpacked_bytes for group in groups), default=0)
        self._batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._first, self._images = 0, ()

    def read(self, row: int, length: int) -> bytes:
        """The bytes in a row, whatever the estimated length. Raises DataError where none are."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if row >= self._first_rows[-1]:
            raise DataError(f"the file has only {self._first_rows[-1]} rows: truncated or replaced")
        with damage_is_the_datas(f"row group {group}"):
            value = self._value(group, row - int(self._first_rows[group]))
            value = value["bytes"] if self._column.endswith(".bytes") and value.is_valid else value
            if not value.is_valid:
                raise DataError("the row holds no image bytes")
            return value.as_py()

    def _value(self, group: int, row: int) -> Any:
        """The scalar in a row of a row group."""
        if group != self._group or row < self._first:
            self._group = -1  # unless the next line raises
            self._batches = self._file.iter_batches(self._batch_rows, [group], [self._column])
            self._group, self._first, self._images = group, 0, ()
        while row >= self._first + len(self._images):
            self._first += len(self._images)
            self._images = ()
            if (batch := next(self._batches, None)) is None:
                self._group = -1
                raise DataError("it has fewer rows than it says")
            batch.validate(full=True)
            self._images = batch.column(0)
        return self._images[row - self._first]

    def close(self) -> None:
        """Close the file."""
        self._batches = iter(())
        self._opened.close()
