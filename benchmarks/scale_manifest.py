"""Manifest tables of any size, as packed shards of images of ImageNet's size would give them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightship.data.manifest import Manifest
from lightship.data.manifest_table import write_table
from lightship.storage.file_list import FileList

CLASSES = 1000
_PER_SHARD, _STRIDE_BYTES = 2370, 113_260  # 256 MiB; 37 samples a block of 4 MiB
_LEAST_BYTES, _RANGE_BYTES = 60_000, 106_721
_MIX = 2_654_435_761


@dataclass
class Computed:
    """A column that is computed where it is read, piece by piece."""

    size: int
    of: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        return self.of(np.arange(start, stop))


def write(path: Path, samples: int) -> None:
    """Write a table of `samples` in the split train. Blocks, in constant memory."""
    columns: dict[str, Any] = {
        "file_index": Computed(samples, lambda i: i // _PER_SHARD),
        "offset": Computed(samples, lambda i: i % _PER_SHARD * _STRIDE_BYTES),
        "length": Computed(samples, lambda i: _LEAST_BYTES + i * _MIX % 2**32 % _RANGE_BYTES),
        "label": Computed(samples, lambda i: i * CLASSES // samples),
        "crc32": Computed(samples, lambda i: i * _MIX % 2**32),
    }
    shards = -(-samples // _PER_SHARD)
    train = Manifest(
        root="s3://bucket/set",
        files=FileList.of(f"train/shard-{number:05d}.tar" for number in range(shards)),
        class_names=[str(i) for i in range(CLASSES)],
        container="bytes",
        encoding="image",
        **columns,
    )
    write_table(path, {"train": train})
