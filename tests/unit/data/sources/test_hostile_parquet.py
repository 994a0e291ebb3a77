"""Parquet files that are made to exhaust memory; honest ones: test_parquet.py."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightship.data.sample_reader import read_samples
from lightship.data.sources import layouts
from lightship.errors import DataError
from tests.support.bounded_child import call_each, refusals
from tests.support.images import little_set

PNG = next(iter(little_set(("train",)).values()))
SCHEMA = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}


def file(rows: int = 2, compression: str = "zstd", **columns: Any) -> bytes:
    table: dict[str, Any] = {"image": repeated(PNG, rows), "label": pa.array(np.zeros(rows, "i4"))}
    table = {name: value for name, value in (table | columns).items() if value is not None}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, compression=compression, store_schema=False,
                   dictionary_pagesize_limit=2**30, row_group_size=2**30)  # fmt: skip
    return buffer.getvalue()


def repeated(value: bytes | str, rows: int) -> Any:
    """One value in all rows, stored once."""
    kind = pa.string() if isinstance(value, str) else pa.binary()
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "i4")), pa.array([value], kind))


def as_struct(images: Any) -> Any:
    return pa.StructArray.from_arrays([images], ["bytes"])


def with_footer_length(data: bytes, length: int) -> bytes:
    return data[:-8] + struct.pack("<I", length) + b"PAR1"


def described(names: Any) -> bytes:
    table = pa.table({"image": [PNG, PNG], "label": [0, 1]})
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), buffer)
    return buffer.getvalue()


REFUSED: dict[str, Callable[[], bytes]] = {
    "labels of 1 MB in 500,000 rows": lambda: file(500_000, label=repeated("x" * 10**6, 500_000)),
    "labels of 300 MiB": lambda: file(1, label=pa.array(["x" * (300 * 2**20)])),
    "2,000,000 rows": lambda: file(2_000_000),
    "2,000,000 rows without a label": lambda: file(2_000_000, label=pa.nulls(2_000_000)),
    "footer of 2 GiB": lambda: with_footer_length(file(), 2**31),
    "footer of 4 GiB - 1": lambda: with_footer_length(file(), 2**32 - 1),
    "footer beyond the file": lambda: with_footer_length(file(), 2**23),
    "footer of 20 MiB": lambda: described(["x" * (20 * 2**20), "y"]),
    "class names nested": lambda: described([[[["a"]]], "b"]),
    "1,000,000 class names": lambda: described([str(i) for i in range(10**6)]),
    "images of a fixed 512 MiB": lambda: file(
        image=pa.array([None, None], pa.binary(2**29)), compression="none"
    ),
    "a cut footer": lambda: with_footer_length(file()[:-100] + b"\0" * 92, 90),
}  # fmt: skip
READ: dict[str, Callable[[], bytes]] = {
    "images of 1 MB in 1,000,000 rows": lambda: file(10**6, image=repeated(bytes(10**6), 10**6)),
    "structs of 1 MB in 1,000,000 rows": lambda: file(
        10**6, image=as_struct(repeated(bytes(10**6), 10**6))
    ),
    "images of 60 MiB in 100,000 rows": lambda: file(
        100_000, image=repeated(bytes(60 * 2**20), 100_000)
    ),
    "an image of 300 MiB": lambda: file(1, image=pa.array([bytes(300 * 2**20)])),
}  # fmt: skip


def scan(path: str) -> None:
    layouts.scan(path)


def read_some(path: str) -> set[str]:
    """Kinds of the first samples, a few of them skipped."""
    manifest = layouts.scan(path)["train"]
    ids = [i for i in (0, 1, 2, 9, 20) if i < len(manifest)]
    return {str(data) if isinstance(data, DataError) else "bytes"
            for _, data in read_samples(manifest, ids)}  # fmt: skip


def written(folder: Path, attacks: dict[str, Callable[[], bytes]]) -> dict[str, tuple[str]]:
    for name, data in attacks.items():
        (folder / f"{name}.parquet").write_bytes(data())
    return {name: (f"{folder}/{name}.parquet",) for name in attacks}


def test_files_that_attack_end_in_a_line(tmp_path):
    said = refusals(scan, written(tmp_path, REFUSED), max_mib=500)
    assert "at most 1024" in said["labels of 1 MB in 500,000 rows"]
    assert "unpacks from" in said["labels of 300 MiB"]
    assert "is said to have 2000000 rows" in said["2,000,000 rows"]
    assert "at most 16777216" in said["footer of 2 GiB"]


def test_a_small_dictionary_takes_little_memory(tmp_path):
    outcomes = call_each(read_some, written(tmp_path, READ), max_mib=700)
    assert outcomes["images of 1 MB in 1,000,000 rows"].result == {"bytes"}
    assert outcomes["structs of 1 MB in 1,000,000 rows"].result == {"bytes"}
    assert outcomes["images of 60 MiB in 100,000 rows"].result == {"bytes"}
    (text,) = outcomes["an image of 300 MiB"].result
    assert "unpacks from" in text


def test_a_sparse_file_with_a_footer_of_gib(tmp_path):
    with (tmp_path / "x.parquet").open("wb") as stream:
        stream.write(b"PAR1")
        stream.truncate(8 * 2**30)
        stream.seek(0, 2)
        stream.write(struct.pack("<I", 2**31 - 1) + b"PAR1")
    refusals(scan, {"x": (f"{tmp_path}/x.parquet",)}, max_mib=100)
