"""The kind of data at a root: by the names of its files, or the first bytes of its only one."""

from collections.abc import Collection, Mapping
from typing import Literal

from lightship import storage
from lightship.data.sources.cifar import cifar_files
from lightship.data.sources.file_names import is_image, suffix
from lightship.errors import DataError

LOOKED_FOR = (
    "class folders of images, WebDataset .tar shards, .parquet files or a CIFAR python archive"
)
Kind = Literal["CIFAR", "image", "tar", "gzipped tar", "Parquet"]
_ENDINGS: dict[Kind, tuple[str, ...]] = {
    "tar": (".tar",), "gzipped tar": (".tar.gz", ".tgz"), "Parquet": (".parquet",),
}  # fmt: skip


def files_by_kind(paths: Collection[str]) -> dict[Kind, list[str]]:
    """The files of each kind that is there. Those of a CIFAR archive are the only kind."""
    if cifar := cifar_files(list(paths)):
        return {"CIFAR": list(cifar.values())}
    kinds: dict[Kind, list[str]] = {"image": [path for path in paths if is_image(path)]}
    for kind, endings in _ENDINGS.items():
        kinds[kind] = [path for path in paths if path.lower().endswith(endings)]
    return {kind: files for kind, files in kinds.items() if files}


def largest_kind(kinds: Mapping[Kind, list[str]], sizes: Mapping[str, int]) -> Kind:
    """The kind with the most bytes."""
    return max(kinds, key=lambda kind: sum(sizes[path] for path in kinds[kind]))


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
