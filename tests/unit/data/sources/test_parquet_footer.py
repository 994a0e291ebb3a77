"""Our reader of footers beside pyarrow's, and footers that end a process in pyarrow's own."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightship.data.sources import layouts
from lightship.data.sources.parquet_footer import read_row_groups
from lightship.errors import DataError
from tests.support.bounded_child import call_each
from tests.support.images import little_set, parquet


def footer_of(data: bytes) -> bytes:
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}, {"version": "1.0"}])
def test_as_pyarrow_reads_it(options) -> None:
    rows = [{"bytes": b"x" * 50, "path": f"{i}"} for i in range(300)]
    nested = [[{"a": 1.5, "b": True}]] * 300
    table = pa.table({"image": rows, "label": list(range(300)), "more": nested, "é": ["a"] * 300})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"x": "y" * 1000})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=7, **options)
    metadata = pq.ParquetFile(buffer).metadata
    groups = read_row_groups(footer_of(buffer.getvalue()))
    assert len(groups) == metadata.num_row_groups == 43
    for g, group in enumerate(groups):
        theirs = metadata.row_group(g)
        columns = [theirs.column(c) for c in range(theirs.num_columns)]
        assert group.num_rows == theirs.num_rows
        assert group.chunks == {
            c.path_in_schema: (c.total_uncompressed_size, c.total_compressed_size) for c in columns
        }


def scan(path: str) -> int:
    return len(layouts.scan(path)["train"])


def test_every_byte_of_a_footer_changed(tmp_path) -> None:
    """Some of them made pyarrow end the process: "histogram size mismatch"."""
    [data] = parquet(little_set(("train",), per_class=1), 9, features=False).values()
    calls = {}
    for at in range(len(data) - 8 - len(footer_of(data)), len(data) - 8):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 4
        (tmp_path / f"{at}.parquet").write_bytes(changed)
        calls[f"byte {at}"] = (f"{tmp_path}/{at}.parquet",)
    outcomes = call_each(scan, calls, max_mib=500).values()
    assert {outcome.exit_code for outcome in outcomes} == {None, 65}
    assert len(outcomes) > 500


@pytest.mark.parametrize(
    "footer",
    [b"", b"\x49", b"\x49\x1c\x16\xff", b"\x15\x02" * 9, b"\x49\xf9" * 400, b"\x0f\xff" * 9],
)
def test_damaged(footer: bytes) -> None:
    with pytest.raises(DataError, match="footer is damaged"):
        read_row_groups(footer)


def test_too_many_values() -> None:
    size = 2**28  # a list of so many booleans, of which none follows
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128,
                    size >> 21 & 127 | 128, size >> 28])  # fmt: skip
    with pytest.raises(DataError, match="more than 5000000 values"):
        read_row_groups(b"\x49\xf1" + varint)
