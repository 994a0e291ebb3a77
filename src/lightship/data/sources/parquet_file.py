"""One Parquet file: its columns of images and labels, and the image bytes of its rows."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from lightship import storage
from lightship.data.names import check_class_names
from lightship.errors import ConfigError, DataError, LightshipError

_LABEL_COLUMNS = ("label", "fine_label", "labels")
_IMAGE_COLUMNS = ("image", "img")
_MAX_LISTED = 20


def require_pyarrow() -> Any:
    """The package pyarrow. Raises ConfigError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "--data.root holds Parquet, which needs pyarrow: pip install lightship[parquet]"
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


@contextmanager
def open_parquet(url: str, name: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`, closed at the end. Blocks.

    Raises:
        DataError: The file is damaged, also where that shows only while it is used.
    """
    with damage_is_the_datas(name), storage.open_binary(url) as stream:
        yield require_pyarrow().parquet.ParquetFile(stream, pre_buffer=True)


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
        or types.is_fixed_size_binary(kind)
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
    """Image bytes of one file's rows; keeps the newest row group. For one thread; blocks."""

    def __init__(self, url: str):
        name = storage.base_name(url)
        with ExitStack() as opened:
            self._file = opened.enter_context(open_parquet(url, name))
            self._column = image_columns(self._file.schema_arrow, name)[0]
            metadata = self._file.metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            self._opened = opened.pop_all()
        self._first_rows = np.cumsum([0, *sizes])
        self._group = -1
        self._images: Any = None

    def read(self, row: int, length: int) -> bytes:
        """The bytes in a row, whatever the estimated length. Raises DataError where none are."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if row >= self._first_rows[-1]:
            raise DataError(f"the file has only {self._first_rows[-1]} rows: truncated or replaced")
        if group != self._group:
            with damage_is_the_datas(f"row group {group}"):
                self._images = self._file.read_row_group(group, columns=[self._column]).column(0)
            self._group = group
        value = self._images[row - int(self._first_rows[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DataError("the row holds no image bytes")
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._opened.close()
