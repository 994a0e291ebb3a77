"""Features of images in a run's folder, so that a restart does not compute them again."""

import hashlib
import io
import json
import logging
import re
from typing import NamedTuple

import numpy as np

from lightship import storage, versions
from lightship.data.batch import NOT_COUNTED
from lightship.data.npz import read_npz

logger = logging.getLogger(__name__)
ROWS = 1024
"""Rows of a part: at most so many are lost by a kill."""
_FORMAT = "features"
_FILE = re.compile(r"[0-9a-f]{32}-\d{5}\.npz")
_TOLERANCE = 0.03
"""Share of the largest value by which rows may differ that another machine computes in bfloat16."""
_MAX_PART_BYTES, _MAX_HEADER_BYTES = 2**28, 2**12


class Rows(NamedTuple):
    """Features of samples.

    Attributes:
        values: [N, D] float32.
        labels: [N] int64, NOT_COUNTED where the image could not be read.
    """

    values: np.ndarray
    labels: np.ndarray


def remove_features(url: str) -> None:
    """Remove what the stores of a run have written; all other files stay. Rank 0; blocks.

    Args:
        url: Folder of the stores' folders.

    Raises:
        ConfigError: One of the folders is a link.
    """
    storage.refuse_link(url)
    for folder in ("sample", "train", "val"):  # of head_init.py and frozen_backbone.py
        inner = storage.join(url, folder)
        storage.refuse_link(inner)
        for name in filter(_FILE.fullmatch, _names(inner)):
            storage.remove(storage.join(inner, name))
    storage.remove_folder(url)


def _names(url: str) -> set[str]:
    """Paths of the files in a folder, none of those below where links lead."""
    try:
        return {file.path for file in storage.list_files(url, skip=lambda folder: True)}
    except storage.NotFound:
        return set()


class FeatureStore:
    """The features of a list of samples, in parts of `ROWS` rows. Rank 0; methods block.

    Args:
        url: Folder, of this store alone.
        key: Hex digest of all that the features depend on.
        labels: [N] integers, of the samples in the list.
    """

    def __init__(self, url: str, key: str, labels: np.ndarray) -> None:
        self.url, self.key, self.labels, self.size = url, key, labels, len(labels)
        self._parts: list[Rows] = []
        self._open: list[Rows] = []
        self._unreadable = _NONE

    def load(self) -> tuple[int, np.ndarray]:
        """Read the parts that are there and whole. What belongs to another key is removed.

        Returns:
            The number of rows, from the first on; and those of them whose image could not be read,
            [K] int64, to be appended again before the others.
        """
        kept = self._load_parts()
        labels = [part.labels for part in self._parts]
        self._unreadable = (
            np.flatnonzero(np.concatenate(labels) == NOT_COUNTED) if labels else _NONE
        )
        return kept, self._unreadable

    def _load_parts(self) -> int:
        self._parts, self._open = [], []
        found = _names(self.url)
        kept = 0
        while (name := self._name(len(self._parts))) in found:
            rows = self._read(name)
            if rows is None or not self._are_of(rows.labels, kept):
                break
            if self._parts and rows.values.shape[1] != self._parts[0].values.shape[1]:
                break
            self._parts.append(rows)
            kept += len(rows.labels)
            found.discard(name)
        for name in filter(_FILE.fullmatch, found):
            storage.remove(storage.join(self.url, name))
        return kept

    def _are_of(self, labels: np.ndarray, first: int) -> bool:
        """Whether these labels of a part are those of its samples, from number `first` on."""
        expected = self.labels[first : first + ROWS]
        if len(labels) != len(expected):
            return False
        return bool(((labels == expected) | (labels == NOT_COUNTED)).all())

    def begins_with(self, rows: Rows) -> bool:
        """Whether the rows that were loaded begin with these, within rounding."""
        kept = _merged(self._parts)
        count = min(len(rows.labels), len(kept.labels))
        values, found = kept.values[:count], rows.values[:count]
        if values.shape != found.shape:
            return False
        is_good = (kept.labels[:count] != NOT_COUNTED) & (rows.labels[:count] != NOT_COUNTED)
        values, found = values[is_good], found[is_good]
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(
            initial=0
        )
        return bool(np.allclose(found, values, 0, _TOLERANCE * largest, equal_nan=True))

    def discard(self) -> None:
        """Remove the rows that were loaded."""
        for number in range(len(self._parts)):
            storage.remove(storage.join(self.url, self._name(number)))
        self._parts, self._open, self._unreadable = [], [], _NONE

    def append(self, rows: Rows) -> None:
        """Add the next rows; a part that is full is written."""
        again = self._unreadable[: len(rows.labels)]
        self._unreadable = self._unreadable[len(again) :]
        for i, place in enumerate(again):
            part, row = self._parts[place // ROWS], place % ROWS
            part.values[row], part.labels[row] = rows.values[i], rows.labels[i]
        self._open.append(Rows(rows.values[len(again) :], rows.labels[len(again) :]))
        count = sum(len(each.labels) for each in self._open)
        done = sum(len(each.labels) for each in self._parts)
        while count >= ROWS or (count and done + count == self.size):
            merged = _merged(self._open)
            part, rest = (Rows(*(column[at] for column in merged)) for at in _AT_ROWS)
            name = self._name(len(self._parts))
            storage.write_bytes(storage.join(self.url, name), _packed(part, self.key))
            self._parts.append(part)
            self._open = [rest] if len(rest.labels) else []
            done, count = done + len(part.labels), len(rest.labels)

    def rows(self) -> Rows:
        """All rows, once all are there."""
        merged = _merged(self._parts)
        assert len(merged.labels) == self.size, (len(merged.labels), self.size)
        return merged

    def _name(self, number: int) -> str:
        return f"{self.key}-{number:05d}.npz"

    def _read(self, name: str) -> Rows | None:
        """A part; None where it is damaged, or of a newer version."""
        url = storage.join(self.url, name)
        try:
            data = storage.read_small(url, _MAX_PART_BYTES)
        except (storage.NotFound, storage.TooLarge):
            return None
        try:
            return _unpacked(data, storage.redact(url), self.key)
        except Exception as error:  # zip, NumPy and JSON raise anything on damaged bytes
            logger.warning(f"{storage.redact(url)} is computed again: {error!r:.200}")
            return None


_NONE = np.array([], dtype=np.int64)
_AT_ROWS = slice(None, ROWS), slice(ROWS, None)


def _merged(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _packed(rows: Rows, key: str) -> bytes:
    values = rows.values.astype("<f4", copy=False).reshape(-1).view("<u4")  # as bits
    labels = rows.labels.astype("<i8", copy=False)
    about = {"format": versions.VERSIONS[_FORMAT], "key": key, "width": rows.values.shape[1]}
    about["sha256"] = _digest(values, labels)
    header = np.frombuffer(json.dumps(about).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, header=header, values=values, labels=labels)
    return buffer.getvalue()


def _digest(values: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes() + labels.tobytes()).hexdigest()


def _unpacked(data: bytes, name: str, key: str) -> Rows:
    """Raises ValueError, DataError and others for what `_packed` did not write."""
    arrays = read_npz(io.BytesIO(data), name)
    if len(arrays["header"]) > _MAX_HEADER_BYTES:
        raise ValueError("its header is too long")
    about = json.loads(arrays["header"].tobytes())
    versions.check(_FORMAT, about["format"], name)
    values, labels, width = arrays["values"], arrays["labels"], about["width"]
    if about["key"] != key or not isinstance(width, int) or width < 1:
        raise ValueError("it is of other images or another net")
    if values.dtype != "<u4" or labels.dtype != "<i8" or len(values) != width * len(labels):
        raise ValueError(f"it has {len(labels)} labels and {len(values)} values")
    if about["sha256"] != _digest(values, labels):
        raise ValueError("it is damaged")
    features = values.view("<f4").reshape(-1, width)
    return Rows(features.astype(np.float32), labels.astype(np.int64))
