"""The footer of a Parquet file, as far as bounds are checked by it: rows, and bytes of the columns.

pyarrow's own view of row groups and columns ends the process (std::terminate) on a damaged footer,
where reading a column raises. Source: Apache Parquet's parquet.thrift, in Thrift's compact
protocol.
"""

from typing import Any, NamedTuple

from lightship.errors import DataError

_MAX_VALUES = 5_000_000
"""Of a footer: 200,000 columns of row groups."""
_MAX_DEPTH = 16
_FALSE, _TRUE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = (
    2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
)  # fmt: skip
_LONG_LIST = 15
_ROW_GROUPS = 4
_COLUMNS, _ROWS = 1, 3
_METADATA = 3
_PATH, _UNPACKED, _PACKED = 3, 6, 7


class Chunk(NamedTuple):
    """A column of a row group."""

    unpacked_bytes: int
    packed_bytes: int


class RowGroup(NamedTuple):
    """A row group.

    Attributes:
        num_rows: Its rows.
        chunks: Path of a column, such as `image.bytes` -> its chunk.
    """

    num_rows: int
    chunks: dict[str, Chunk]


def read_row_groups(footer: bytes) -> list[RowGroup]:
    """The row groups that a footer (without its length and the magic number) names.

    Raises:
        DataError: It is damaged, or has far more values than any file needs.
    """
    try:
        groups = _Reader(footer).struct(0)[_ROW_GROUPS]
        return [RowGroup(_whole(g[_ROWS]), dict(map(_chunk, g[_COLUMNS]))) for g in groups]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"its footer is damaged ({type(error).__name__}: {error})") from error


def _chunk(column: dict[int, Any]) -> tuple[str, Chunk]:
    about = column[_METADATA]
    path = b".".join(about[_PATH]).decode("utf-8", "surrogateescape")
    return path, Chunk(_whole(about[_UNPACKED]), _whole(about[_PACKED]))


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} rows or bytes")
    return value


class _Reader:
    """Thrift's compact protocol: a struct as {field id: value}, a list or map as a list."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._left = data, 0, _MAX_VALUES

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            number = number + step if step else self._zigzag()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._count(1)
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BINARY:
            return self._take(self._varint())
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            header = self._byte()
            size = header >> 4 if header >> 4 < _LONG_LIST else self._varint()
            return self._values(size, [header & 15], depth)
        if kind == _MAP:
            kinds = self._byte() if (size := self._varint()) else 0
            return self._values(size, [kinds >> 4, kinds & 15], depth)
        if kind in (_TRUE, _FALSE, _BYTE):  # of a list: a byte each
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        raise ValueError(f"a value of the type {kind}")

    def _values(self, size: int, kinds: list[int], depth: int) -> list[Any]:
        self._count(size)
        return [self._value(kind, depth + 1) for _ in range(size) for kind in kinds]

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise DataError(f"its footer has more than {_MAX_VALUES} values")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise IndexError(f"{size} bytes are to follow byte {self._at - size}")
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
