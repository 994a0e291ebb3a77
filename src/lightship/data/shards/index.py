"""Shards: the tar files that `lightship pack` writes, and the index that makes them one table.

A shard is a WebDataset tar: for each sample `KEY.cls` (its class number) and then `KEY.EXT` (its
image). The same samples give the same bytes, and where the last image ends tells the tar's size, so
the index is the plain manifest format and can yet be compared with a listing.
"""

import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import BinaryIO, TypeVar

import numpy as np

from lightship import storage
from lightship.data.manifest import Manifest, load_manifests
from lightship.data.names import printable
from lightship.errors import DataError
from lightship.storage.urls import stays_below

INDEX = "lightship-index.npz"
"""The file at the root of packed shards that says where every sample lies."""
WORK = ".packing"
"""The folder at that root that is there while packing, or after it was stopped."""
UNFINISHED = f"{WORK}/unfinished"
PLAN, SKIPPED = "pack.json", "skipped.txt"
"""Files at that root: what is packed (`plan.Plan`), and which images were skipped."""
_AT_ONCE = 2**20
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
    for start in range(0, len(manifest), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        ends = manifest.offset[part].astype(np.int64) + manifest.length[part].astype(np.int64)
        np.maximum.at(end, manifest.file_index[part], ends)
    return dict(zip(manifest.files, _tar_bytes(end).tolist(), strict=True))


def load_index(
    url: str,
    root: str,
    sizes_of: Callable[[Iterable[str]], Mapping[str, int]],
    load: Callable[[], dict[str, Manifest]] | None = None,
) -> dict[str, Manifest]:
    """The splits of the packed shards at `url`, whose index must agree with them. Rank 0; blocks.

    Compared are the sizes of all files; a sample's checksum is compared when it is read.

    Args:
        url: The root.
        root: What to call it in messages.
        sizes_of: File -> bytes for those of the given files that are there, and any other files.
        load: Reads the index, if that is begun already; default: it is read here.

    Raises:
        DataError: The index is damaged, or shards are missing, of another size, or not in it.
        NewerVersion: A newer version wrote the index.
        NotFound: There is no index.
    """
    where = f"{root}: the index {INDEX}"
    remedy = "pack again, or remove the index to have the shards read without it"
    try:
        manifests = load() if load else load_manifests(storage.join(url, INDEX))
    except DataError as error:
        raise DataError(f"{where} cannot be used ({error}); {remedy}") from error
    files = [file for manifest in manifests.values() for file in manifest.files]
    if strange := [file for file in files if not stays_below(url, file)]:
        raise DataError(f"{where} names {printable(strange[0])}, which is not below it; {remedy}")
    expected = {f: size for m in manifests.values() for f, size in shard_sizes(m).items()}
    there = sizes_of(expected)
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
    return {split: replace(manifest, root=url) for split, manifest in manifests.items()}


def _whole(length: Bytes, unit: int) -> Bytes:
    return -(-length // unit) * unit


def _tar_bytes(end: Bytes) -> Bytes:
    """Size of a tar whose last member's content ends at `end`."""
    return _whole(_whole(end, tarfile.BLOCKSIZE) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
