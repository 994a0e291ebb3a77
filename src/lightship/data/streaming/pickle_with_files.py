"""Pickles whose mapped files are handed over open, as descriptors, not by their paths.

So the data worker maps the very file that its rank has mapped, even if it was removed since.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightship.data.columns import Columns


def dumps(value: Any) -> tuple[bytes, list[int]]:
    """A pickle, and the descriptors of the files that the value maps; they stay the caller's."""
    pickler = _Pickler(buffer := io.BytesIO(), pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    return buffer.getvalue(), [columns.descriptor for columns in pickler.files]


def loads(data: bytes, descriptors: Sequence[int]) -> Any:
    """What `dumps` was given. It owns the descriptors from now on."""
    return _Unpickler(io.BytesIO(data), descriptors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.files: list[Columns] = []

    def persistent_id(self, obj: Any) -> tuple[int, str] | None:
        if not isinstance(obj, Columns):
            return None
        if obj not in self.files:
            self.files.append(obj)
        return self.files.index(obj), str(obj.path)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, descriptors: Sequence[int]) -> None:
        super().__init__(file)
        self._descriptors = descriptors
        self._files: dict[int, Columns] = {}

    def persistent_load(self, pid: tuple[int, str]) -> Columns:
        number, path = pid
        if number not in self._files:
            self._files[number] = Columns(Path(path), self._descriptors[number])
        return self._files[number]
