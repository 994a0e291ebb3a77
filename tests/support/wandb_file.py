"""Reads a .wandb file back: LevelDB log blocks that hold protobuf records."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER = struct.Struct("<4sHB")
_RECORD_HEADER = struct.Struct("<IHB")
_BLOCK_BYTES = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Every record in order; a wrong checksum or order of fragments is an AssertionError."""
    content = path.read_bytes()
    mark, magic, _ = _FILE_HEADER.unpack_from(content)
    assert (mark, magic) == (b":W&B", 0xBEE1)
    at, parts = _FILE_HEADER.size, b""
    while at < len(content):
        left_in_block = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left_in_block < _RECORD_HEADER.size:
            at += left_in_block
            continue
        checksum, length, kind = _RECORD_HEADER.unpack_from(content, at)
        data = content[at + _RECORD_HEADER.size : at + _RECORD_HEADER.size + length]
        assert len(data) == length
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        assert bool(parts) == (kind in (_MIDDLE, _LAST))
        parts += data
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
        at += _RECORD_HEADER.size + length


@dataclass
class WandbFile:
    """What an offline run would upload."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    x_axes: dict[str, str] = field(default_factory=dict)
    """Step metric by the glob of the metrics it is for."""
    exit_code: int | None = None


def read_wandb_file(path: Path) -> WandbFile:
    """The run in `path`, as plain values."""
    found = WandbFile()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run_id, found.project = record.run.run_id, record.run.project
            found.name = record.run.display_name
            found.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            found.config |= {i.key: json.loads(i.value_json) for i in record.config.update}
        elif kind == "history":
            items = record.history.item
            found.history.append(
                {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            )
        elif kind == "metric" and record.metric.step_metric:
            found.x_axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found
