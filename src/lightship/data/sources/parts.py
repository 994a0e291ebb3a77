"""What a scan of a root finds: parts of splits, which `build_manifests` joins."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Label = str | int | None
"""A class by name or by number; None: unlabelled."""


@dataclass(frozen=True)
class Labels:
    """The labels of N samples: few values and where each stands, not an object a sample."""

    values: list[Label]
    """Each once."""
    index: np.ndarray
    """[N] into `values`."""

    @classmethod
    def of(cls, labels: Iterable[Label]) -> "Labels":
        """Of one label a sample."""
        places: dict[Label, int] = {}
        index = array("i", (places.setdefault(label, len(places)) for label in labels))
        return cls(list(places), np.array(index))

    def __len__(self) -> int:
        return len(self.index)

    def where(self, is_wanted: Callable[[Label], bool]) -> np.ndarray:
        """The samples, ascending, whose label is wanted."""
        wanted = np.fromiter(map(is_wanted, self.values), bool, len(self.values))
        return np.flatnonzero(wanted[self.index])

    def numbers(self, number_of: Callable[[Label], int]) -> np.ndarray:
        """The number of each sample's label, [N] int64."""
        numbers = np.fromiter(map(number_of, self.values), np.int64, len(self.values))
        return numbers[self.index]


@dataclass
class Part:
    """Samples of one split from one scanned file or folder, in manifest order (see `Manifest`)."""

    split: str
    files: Sequence[str]
    file_index: Sequence[int] | np.ndarray
    offset: Sequence[int] | np.ndarray
    length: Sequence[int] | np.ndarray
    labels: Sequence[Label] | Labels
    crc32: Sequence[int] | np.ndarray | None = None
    members: Sequence[str] | None = None


@dataclass
class Found:
    """All that was found at a root."""

    parts: list[Part]
    container: Literal["bytes", "gzip", "parquet"] = "bytes"
    encoding: str = "image"
    class_names: list[str] | None = None
    """None: the sorted names, or the numbers from 0, that the labels show."""
    class_folders: bool = False
    """Labels are folders, so that every split must have the same."""
    not_read: Sequence[str] = field(default_factory=list)
    """Paths of the files that no reader takes."""
    ignored: list[str] = field(default_factory=list)
    """Folders that are left out whole: of the system, of runs."""
