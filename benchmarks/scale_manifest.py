"""Manifest tables of any size, as packed shards of images of ImageNet's size would give them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightship.data.columns import ColumnWriter
from lightship.data.file_list import FileList

CLASSES = 1000
_PER_SHARD, _STRIDE_BYTES = 2370, 113_260  # 256 MiB; 37 samples a block of 4 MiB
_LEAST_BYTES, _RANGE_BYTES = 60_000, 106_721
_MIX, _AT_ONCE = 2_654_435_761, 2**20


@dataclass
class Computed:
    """A column that is computed where it is read, which is all that `ColumnWriter` does with it."""

    size: int
    of: Callable[[np.ndarray], np.ndarray]
    bounds: tuple[int, int]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        return self.of(np.arange(start, stop))

    def min(self) -> int:
        """The least value, or less."""
        return self.bounds[0]

    def max(self) -> int:
        """The greatest value, or more."""
        return self.bounds[1]


def write(path: Path, samples: int) -> None:
    """Write a table of `samples` in the split train. Blocks, in constant memory."""
    shards = -(-samples // _PER_SHARD)
    columns = {
        "file_index": Computed(samples, lambda i: i // _PER_SHARD, (0, shards - 1)),
        "offset": Computed(
            samples, lambda i: i % _PER_SHARD * _STRIDE_BYTES, (0, _PER_SHARD * _STRIDE_BYTES)
        ),
        "length": Computed(samples, _length, (0, _LEAST_BYTES + _RANGE_BYTES)),
        "label": Computed(samples, lambda i: i * CLASSES // samples, (0, CLASSES - 1)),
        "crc32": Computed(samples, lambda i: i * _MIX % 2**32, (0, 2**32 - 1)),
    }
    lengths = columns["length"]
    size_bytes = sum(int(lengths[s : s + _AT_ONCE].sum()) for s in range(0, samples, _AT_ONCE))
    files = FileList.of(f"train/shard-{number:05d}.tar" for number in range(shards))
    with path.open("wb") as file:
        out = ColumnWriter(file)
        for name, column in columns.items():
            out.add(f"train.{name}", column)  # type: ignore[arg-type]
        out.add("train.files", np.frombuffer(files.text, np.uint8))
        out.add("train.files.starts", files.starts)
        about = {
            "root": "s3://bucket/set", "size_bytes": size_bytes, "first_unlabelled": None,
            "fingerprint": "0" * 32, "container": "bytes", "encoding": "image", "not_read": "",
        }  # fmt: skip
        out.finish({"class_names": [str(i) for i in range(CLASSES)], "splits": {"train": about}})


def _length(i: np.ndarray) -> np.ndarray:
    return _LEAST_BYTES + (i * _MIX % 2**32) % _RANGE_BYTES
