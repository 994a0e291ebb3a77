"""The kind of data at a root: by the names of its files, or the first bytes of its only one."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from lightship import storage
from lightship.data.sources.cifar import cifar_files
from lightship.data.sources.file_names import IMAGE_SUFFIXES, is_image, suffix
from lightship.errors import DataError
from lightship.storage.file_table import FileTable

LOOKED_FOR = (
    "class folders of images, WebDataset .tar shards, .parquet files or a CIFAR python archive"
)
Kind = Literal["CIFAR", "image", "tar", "gzipped tar", "Parquet"]
_KINDS: tuple[Kind, ...] = ("image", "tar", "gzipped tar", "Parquet")
_OF_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, 0), "tar": 1, "gz": 2, "tgz": 2, "parquet": 3,
}  # fmt: skip


def files_by_kind(files: FileTable) -> dict[Kind, np.ndarray]:
    """Which files, [F] bool, are of each kind that is there. A CIFAR archive is the only kind."""
    if cifar := cifar_files(files):
        paths = set(cifar.values())
        return {"CIFAR": files.mask(paths.__contains__)}
    numbers = np.fromiter(map(_kind_number, files), np.int8, len(files))
    masks = {kind: numbers == number for number, kind in enumerate(_KINDS)}
    return {kind: mask for kind, mask in masks.items() if mask.any()}


def _kind_number(path: str) -> int:
    """The place of a file's kind in `_KINDS`; -1: it has none."""
    ending = suffix(path)
    if ending == "gz" and not path.lower().endswith(".tar.gz"):
        return -1
    return _OF_SUFFIX.get(ending, -1)


def bytes_by_kind(kinds: Mapping[Kind, np.ndarray], files: FileTable) -> dict[Kind, int]:
    """The bytes of all files of each kind."""
    return {kind: int(files.sizes.sum(where=mask)) for kind, mask in kinds.items()}


def kind_of_file(url: str, size_bytes: int, root: str) -> Kind:
    """The kind of a root that is one file: by its first bytes, then its name. Blocks.

    Args:
        url: Of the file.
        size_bytes: Its size.
        root: What to call it in messages.

    Raises:
        DataError: It is of none.
    """
    head = storage.read_range(url, 0, min(size_bytes, 512))
    if head.startswith(b"\x1f\x8b"):
        return "gzipped tar"
    if head[257:262] == b"ustar" or url.lower().endswith(".tar"):
        return "tar"
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"--data.root {root} is a zip; give it as zip://::{root}")
    if is_image(storage.base_name(url)):
        return "image"
    raise DataError(
        f"--data.root {root} is one file of {size_bytes} bytes and no tar, zip or Parquet; "
        f"looked for {LOOKED_FOR}"
    )


def may_be_packed(url: str) -> bool:
    """Whether packed shards may lie under a web address, where nothing can be listed.

    What looks like a file, by its suffix or a query, is not asked for an index; a slash at the end
    says that it is none.
    """
    looks_like_file = suffix(storage.base_name(url)) and not url.endswith("/")
    is_web = url.startswith(("http://", "https://"))
    return is_web and "?" not in url and not looks_like_file
