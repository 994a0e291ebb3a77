"""The manifest: one table of samples, whatever they come from."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightship import storage
from lightship.data.blocks import Blocks
from lightship.data.columns import Pieces
from lightship.data.mapped_split import NUMBERS, MappedSplit
from lightship.errors import DataError
from lightship.storage.file_list import FileList

BLOCK_BYTES = 4 * 2**20
LABELLED_SPLITS = ("train", "val", "test")
"""Their names; files that a source or a pack writes for a split lie under its name."""
_SMALL_BYTES, _MAX_BLOCK_SAMPLES = 256 * 2**20, 2**16
_FILES_AT_ONCE = 2**16


@dataclass(frozen=True)
class Manifest:
    """One split: where the bytes of each sample lie, and its class. N samples in training order."""

    root: str
    """URL that `files` are relative to (`storage.join(root, file)`; "" is the root itself)."""
    files: Sequence[str]
    """Given in any form, held as a `FileList`."""
    file_index: np.ndarray
    """[N] into `files`. Like every column of any integer type: a mapped column has the narrowest
    that holds its values, so convert to int64 before computing."""
    offset: np.ndarray
    """[N] first byte in the file; container "gzip": of the decompressed file; "parquet": row."""
    length: np.ndarray
    """[N] bytes; container "parquet": the mean of the row group."""
    label: np.ndarray
    """[N] into `class_names`, -1 unlabelled."""
    crc32: np.ndarray
    """[N] CRC-32 of the sample's bytes, -1 unknown."""
    class_names: list[str]
    container: Literal["bytes", "gzip", "parquet"]
    encoding: str
    """"image" (JPEG, PNG, WebP ... bytes) or "raw:3x32x32" (uint8 pixels, CHW; each
    side 1 to 9999)."""
    members: Sequence[str] | None = None
    """[N] what each sample is called within its file, where that is known: names for a table of
    predictions. They are no part of the fingerprint."""
    max_sample_bytes: int = 2**30
    """A larger sample is unreadable (`--data.max_sample_mib`); not saved."""
    scan_id: str = ""
    """Of the scan that found the samples, the same whenever its run starts again; empty: not known.
    Not saved, and no part of the fingerprint."""
    not_read: str = ""
    """What else lies at the root and no reader takes, in words (`24 .heic files`)."""
    mapped: MappedSplit | None = field(default=None, repr=False, compare=False)
    """The file that the columns are mapped from (see `manifest_table.py`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", FileList.of(self.files))

    def __len__(self) -> int:
        return len(self.label)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped, which the reader of a pickle maps itself."""
        state = dict(self.__dict__)
        if self.mapped is not None:
            for name, value in self.mapped.fields.items():
                if state[name] is value:
                    del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update((state["mapped"].fields if state["mapped"] else {}) | state)

    @property
    def summary(self) -> MappedSplit | None:
        """What the mapped file knows of the columns, if they all are the mapped ones."""
        mapped = self.mapped
        if mapped is None:
            return None
        is_whole = all(getattr(self, name) is value for name, value in mapped.fields.items())
        return mapped if is_whole else None

    def url(self, file_number: int) -> str:
        """URL of `files[file_number]`."""
        file = self.files[file_number]
        return storage.join(self.root, file) if file else self.root

    def name(self, i: int) -> str:
        """What sample `i` is called: its file, and #member (else #offset or #row) within it."""
        file = self.files[self.file_index[i]] or storage.base_name(self.root)
        if self.members is not None:
            return f"{file}#{self.members[i]}"
        whole_file = self.container == "bytes" and self.offset[i] == 0
        return file if whole_file else f"{file}#{self.offset[i]}"

    @property
    def is_small(self) -> bool:
        """Whether there are so few bytes (256 MiB) that a shuffle need not care where they lie."""
        return self.size_bytes <= _SMALL_BYTES

    @functools.cached_property
    def size_bytes(self) -> int:
        """Bytes of all samples."""
        return self.summary.size_bytes if self.summary else int(self.length.sum())

    @property
    def first_unlabelled(self) -> int | None:
        """The first sample without a label; None: all have one."""
        if self.summary:
            return self.summary.first_unlabelled
        start = 0
        for labels in Pieces(self.label):
            if labels.min() < 0:
                return start + int(np.argmax(labels < 0))
            start += len(labels)
        return None

    @property
    def is_checked(self) -> bool:
        """Whether each sample has a checksum, by which its content is known."""
        crc32 = self.crc32
        if crc32.dtype.kind == "u":  # as a mapped column without -1: no pass over it
            return True
        return int((crc32 if crc32.strides[0] else crc32[:1]).min(initial=0)) >= 0

    def blocks(self) -> Blocks:
        """Neighbouring samples that are read together: about 4 MiB each, or row groups.

        They follow from the number of samples and their bytes alone, so that a folder and the
        shards packed from it have the same.
        """
        if self.container == "parquet":
            edges = self.block_edges()
            sizes, counts = np.unique(np.diff(edges), return_counts=True)
            return Blocks(edges, int(sizes[np.argmax(sizes * counts)]))
        size = len(self) * BLOCK_BYTES // max(1, self.size_bytes)
        return Blocks(np.array([0, len(self)]), max(1, min(size, len(self), _MAX_BLOCK_SAMPLES)))

    def block_edges(self) -> np.ndarray:
        """Row groups of Parquet, or the blocks of version 1 of the order, [K + 1] int64.

        Block k holds the samples from edges[k] up to edges[k + 1].
        """
        if self.summary and self.summary.edges is not None:
            return self.summary.edges.astype(np.int64)
        if self.container == "parquet":
            changes = [
                np.diff(column, prepend=-1) != 0 for column in (self.file_index, self.length)
            ]
            number = np.cumsum(changes[0] | changes[1])
        else:
            number = (np.cumsum(self.length) - self.length) // BLOCK_BYTES
        inner = np.flatnonzero(np.diff(number)) + 1
        return np.concatenate([[0], inner, [len(self)]]).astype(np.int64)

    def within(self, max_sample_mib: float) -> "Manifest":
        """The same samples, of which larger ones are unreadable."""
        return replace(self, max_sample_bytes=int(max_sample_mib * 2**20))

    def take(self, ids: np.ndarray | Sequence[int]) -> "Manifest":
        """The samples `ids` ([M] integers, any order), with the files they need and no others."""
        ids = np.asarray(ids, dtype=np.int64)
        file_index = self.file_index[ids]
        files, numbers = self.files_of([file_index])
        return replace(
            self,
            files=files,
            file_index=numbers[file_index],
            mapped=None,
            members=None if self.members is None else [self.members[i] for i in ids.tolist()],
            **{column: getattr(self, column)[ids] for column in NUMBERS[1:]},
        )

    def files_of(self, file_index: Iterable[np.ndarray]) -> tuple[FileList, np.ndarray]:
        """The files that some samples need, and their new numbers.

        Args:
            file_index: Of the samples, in any pieces.

        Returns:
            (files, [F] int32: their number by the old one).
        """
        used = np.zeros(len(self.files), dtype=bool)
        for piece in file_index:
            used[piece] = True
        return FileList.of(self.files).select(used), np.cumsum(used, dtype=np.int32) - 1

    def content_key(self) -> str | None:
        """What tells the samples' bytes from others under the same names; None: nothing does.

        Without checksums that is the scan: an object may be overwritten by one of the same length,
        and its bytes are then those of this run, from its first epoch to its last restart.
        """
        if self.is_checked:
            return self.fingerprint()
        return f"{self.fingerprint()} {self.scan_id}" if self.scan_id else None

    def fingerprint(self) -> str:
        """Hex digest of all but `root`: equal where the same samples come in the same order."""
        if self.summary:
            return self.summary.fingerprint
        digest = hashlib.sha256()
        digest.update(b"[[")
        for start in range(0, len(self.files), _FILES_AT_ONCE):
            some = json.dumps(list(self.files[start : start + _FILES_AT_ONCE]))[1:-1]
            digest.update(f"{', ' if start else ''}{some}".encode())
        rest = json.dumps([self.class_names, self.container, self.encoding])
        digest.update(f"], {rest[1:]}".encode())
        for column in NUMBERS:
            for piece in Pieces(getattr(self, column)):
                digest.update(piece.astype("<i8").data)
        return digest.hexdigest()[:32]


def refuse_one_class(train: Manifest, root: str) -> None:
    """Raise DataError, naming the most likely mistake of layout, if there is only one class.

    Args:
        train: The train split.
        root: data.root, as it was given.
    """
    if len(train.class_names) > 1:
        return
    [name] = train.class_names
    shown = storage.redact(root)
    first = train.name(0)
    _, is_folder, below = first.partition(f"{name}/")
    where = f"{shown}/train" if first.startswith("train/") else shown
    if not is_folder:
        advice = "all of its labels are the same"
    elif "/" in below:
        folder = below.partition("/")[0]
        advice = f"if its sub-folders ({folder}, ...) are the classes, move them to {where}"
    else:
        advice = f"each class is a folder of images directly below {where}"
    raise DataError(
        f"--data.root {shown} has only one class, '{name}' ({len(train)} train images), and "
        f"a classifier needs two: {advice}"
    )
