"""What a scan of a root finds: parts of splits, which `build_manifests` joins."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Label = str | int | None
"""A class by name or by number; None: unlabelled."""


@dataclass
class Part:
    """Samples of one split from one scanned file or folder, in manifest order (see `Manifest`)."""

    split: str
    files: list[str]
    file_index: Sequence[int] | np.ndarray
    offset: Sequence[int] | np.ndarray
    length: Sequence[int] | np.ndarray
    labels: Sequence[Label]
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
    not_read: list[str] = field(default_factory=list)
    """Paths of the files that no reader takes."""
    ignored: list[str] = field(default_factory=list)
    """Folders that are left out whole: of the system, of runs."""
