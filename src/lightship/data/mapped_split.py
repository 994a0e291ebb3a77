"""One split of a manifest table: its columns as they are mapped, and their summary.

A pickle of it has neither the columns nor the names: the data worker gets the open file, and maps
it itself (see `streaming/pickle_with_files.py`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightship.data.columns import Columns
from lightship.errors import DataError
from lightship.storage.file_list import FileList

NUMBERS = ("file_index", "offset", "length", "label", "crc32")
"""The columns of a manifest."""


@dataclass(frozen=True, eq=False)
class MappedSplit:
    """A split of a file of `manifest_table.py`.

    Attributes:
        columns: The file.
        split: Its name.
        fields: Attribute of the `Manifest` -> its value: all that its fingerprint depends on, and
            `members`.
        size_bytes: Bytes of all samples.
        first_unlabelled: The first sample without a label; None: there is none.
        fingerprint: Of the `Manifest`.
        edges: [K + 1] of its row groups; None: it has none.
    """

    columns: Columns
    split: str
    fields: dict[str, Any]
    size_bytes: int
    first_unlabelled: int | None
    fingerprint: str
    edges: np.ndarray | None

    @classmethod
    def of(cls, columns: Columns, split: str, summary: Any) -> "MappedSplit":
        """From an open file.

        Args:
            columns: The file.
            split: Name of the split.
            summary: Of the split, from the file's header.

        Raises:
            DataError: The parts do not fit each other.
        """
        fields: dict[str, Any] = {name: columns.read(f"{split}.{name}") for name in NUMBERS}
        for name in ("files", "members"):
            fields[name] = None
            if columns.has(f"{split}.{name}"):
                fields[name] = _names(columns, f"{split}.{name}")
        count = len(fields["label"])
        if fields["files"] is None or any(len(fields[name]) != count for name in NUMBERS):
            raise DataError(f"{columns.path} is damaged: the columns of {split} differ in length")
        edges = columns.read(f"{split}.edges") if columns.has(f"{split}.edges") else None
        try:
            fields["class_names"] = columns.header["class_names"]
            fields |= {name: summary[name] for name in ("container", "encoding")}
            size_bytes, first = summary["size_bytes"], summary["first_unlabelled"]
            if type(size_bytes) is not int:  # JSON has 1e999, too
                raise TypeError(f"size_bytes {size_bytes!r:.20}")
            if first is not None and (type(first) is not int or not 0 <= first < count):
                raise ValueError(f"first_unlabelled {first!r:.20}")
            if fields["members"] is not None and len(fields["members"]) != count:
                raise ValueError(f"{len(fields['members'])} members of {count} samples")
            if edges is not None and fields["container"] != "parquet":
                raise ValueError(f"row groups of {fields['container']!r:.20}")
            fingerprint = str(summary["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{columns.path} is damaged: {split}: {error!r:.200}") from error
        return cls(columns, split, fields, size_bytes, first, fingerprint, edges)

    def __reduce__(self) -> tuple[Any, ...]:
        return map_split, (self.columns, self.split)


def map_split(columns: Columns, split: str) -> MappedSplit:
    """A split of a file that `manifest_table.open_table` has accepted."""
    return MappedSplit.of(columns, split, columns.header["splits"][split])


def _names(columns: Columns, name: str) -> FileList:
    text, starts = columns.read(name), columns.read(f"{name}.starts")
    if not len(starts) or int(starts[-1]) != len(text) + 1:
        raise DataError(f"{columns.path} is damaged: {name} has other bytes than its places say")
    return FileList(np.ascontiguousarray(text, np.uint8).data, starts)
