"""Shards: the tar files that `lightship pack` writes, and the index that makes them one table.

A shard is a WebDataset tar: for each sample `KEY.cls` (its class number) and then `KEY.EXT` (its
image). The same samples give the same bytes, and where the last image ends tells the tar's size, so
the index is a manifest table, which a run takes as it is, and can yet be compared with a listing.
"""

import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import BinaryIO, TypeVar

import numpy as np

from lightship import storage
from lightship.data import table_cache
from lightship.data.columns import Pieces
from lightship.data.manifest import Manifest
from lightship.data.manifest_npz import load_manifests
from lightship.data.manifest_table import check_table, open_table
from lightship.data.names import printable
from lightship.data.table_cache import Table
from lightship.errors import DataError
from lightship.storage.urls import stays_below

INDEX, INDEX_0_1 = "lightship-index.table", "lightship-index.npz"
"""The file at the root of packed shards that says where every sample lies, and that of 0.1.0."""
WORK = ".packing"
"""The folder at that root that is there while packing, or after it was stopped."""
UNFINISHED = f"{WORK}/unfinished"
PLAN, SKIPPED = "pack.json", "skipped.txt"
"""Files at that root: what is packed (`plan.Plan`), and which images were skipped."""
_FREE_BYTES, _SIZE_THREADS = 2**20, 16
_MEMBER_BYTES = 2 * tarfile.BLOCKSIZE  # a header and at most one block of content: KEY.cls


Bytes = TypeVar("Bytes", int, np.ndarray)


class ShardWriter:
    """Writes one tar to an open file; `close` ends the tar, not the file."""

    def __init__(self, file: BinaryIO):
        self._file, self._at, self._end = file, 0, 0

    def add(self, key: str, label: int, data: bytes, extension: str) -> int:
        """Append a sample; the offset of its image's first byte."""
        self._add_member(f"{key}.cls", str(label).encode())
        offset = self._add_member(f"{key}.{extension}", data)
        self._end = offset + len(data)
        return offset

    def _add_member(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)  # of time 0, of user 0
        member.size = len(data)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        self._file.write(header)
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        offset = self._at + len(header)
        self._at = offset + _whole(len(data), tarfile.BLOCKSIZE)
        return offset

    def close(self) -> int:
        """Write what ends a tar; its size in bytes."""
        size = _tar_bytes(self._end)
        self._file.write(bytes(size - self._at))
        return size


def sample_bytes(length: np.ndarray) -> np.ndarray:
    """What samples whose images have `length` ([N]) bytes take in a shard."""
    return _MEMBER_BYTES + tarfile.BLOCKSIZE + _whole(length, tarfile.BLOCKSIZE)


def shard_sizes(manifest: Manifest) -> dict[str, int]:
    """File -> bytes, of the shards of a packed split."""
    end = np.zeros(len(manifest.files), dtype=np.int64)
    columns = (Pieces(column) for column in (manifest.file_index, manifest.offset, manifest.length))
    for files, offset, length in zip(*columns, strict=True):
        np.maximum.at(end, files, offset.astype(np.int64) + length.astype(np.int64))
    return dict(zip(manifest.files, _tar_bytes(end).tolist(), strict=True))


def index_in(files: Collection[str]) -> str | None:
    """The index among the files of a root; None: there is none."""
    return next((name for name in (INDEX, INDEX_0_1) if name in files), None)


def read_index(url: str, name: str, table: Table | None = None) -> dict[str, Manifest]:
    """The splits of an index, mapped from this node's copy of it. Rank 0; blocks.

    Args:
        url: The root.
        name: Of the index at that root.
        table: The index, if its last bytes are read already.

    Raises:
        DataError: It is damaged.
        NewerVersion: A newer version wrote it.
        NotFound: There is none.
    """
    index_url = storage.join(url, name)
    if name == INDEX_0_1:
        manifests = load_manifests(index_url)
    else:
        manifests = open_table(table_cache.fetch(table or Table.at(index_url), check_table))
    return {split: replace(each, root=url, not_read="") for split, each in manifests.items()}


def load_index(
    url: str,
    name: str,
    root: str,
    listed: Mapping[str, int] | None,
    find: Callable[[], Table] | None = None,
) -> dict[str, Manifest]:
    """The splits of the packed shards at `url`, whose index must agree with them. Rank 0; blocks.

    Compared are the sizes of all files; a sample's checksum is compared when it is read.

    Args:
        url: The root.
        name: Of the index at that root.
        root: What to call it in messages.
        listed: File -> bytes of what is there; None: it cannot be listed.
        find: Gives the index, if its last bytes are being read already.

    Raises:
        DataError: The index is damaged, or shards are missing, of another size, or not in it.
        NewerVersion: A newer version wrote the index.
        NotFound: There is no index.
    """
    where = f"{root}: the index {name}"
    remedy = "pack again, or remove the index to have the shards read without it"
    try:
        table = find() if find and name == INDEX else None
        shards_bytes = sum(size for file, size in (listed or {}).items() if file.endswith(".tar"))
        if listed is not None and listed[name] > _FREE_BYTES + shards_bytes:
            raise DataError(f"it has {listed[name]} bytes, more than the shards")
        manifests = read_index(url, name, table)
    except DataError as error:
        raise DataError(f"{where} cannot be used ({error}); {remedy}") from error
    files = [file for manifest in manifests.values() for file in manifest.files]
    if strange := [file for file in files if not stays_below(url, file)]:
        raise DataError(f"{where} names {printable(strange[0])}, which is not below it; {remedy}")
    expected = {f: size for m in manifests.values() for f, size in shard_sizes(m).items()}
    there = _sizes_on_web(url, expected) if listed is None else listed
    for file, size in expected.items():
        if file not in there:
            raise DataError(f"{where} names {file}, which is missing; restore it or {remedy}")
        if there[file] != size:
            raise DataError(
                f"{where} does not fit {file}: it has {there[file]} bytes, not {size}; {remedy}"
            )
    more = [file for file in there if file.endswith(".tar") and file not in expected]
    if more:
        raise DataError(f"{where} does not know {more[0]} ({len(more)} such); {remedy}")
    return manifests


def _sizes_on_web(url: str, files: Iterable[str]) -> dict[str, int]:
    """File -> bytes, of those that are there."""

    def size_of(file: str) -> tuple[str, int] | None:
        try:
            return file, storage.size_bytes(storage.join(url, file))
        except (storage.NotFound, storage.Denied):
            return None

    return dict(filter(None, storage.parallel_map(size_of, files, _SIZE_THREADS)))


def _whole(length: Bytes, unit: int) -> Bytes:
    return -(-length // unit) * unit


def _tar_bytes(end: Bytes) -> Bytes:
    """Size of a tar whose last member's content ends at `end`."""
    return _whole(_whole(end, tarfile.BLOCKSIZE) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
