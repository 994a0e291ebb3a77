"""What --data.root names: an embedded or published set, a download, the inside of a zip, a URL."""

import importlib.resources
import logging
import os

from lightship import storage
from lightship.storage.urls import split

logger = logging.getLogger(__name__)
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
NAMED_ROOTS = {
    "cifar10": (_CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": (_CIFAR + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}
"""Shorthands for (--data.root, --data.root_md5)."""


def warn_of_shadowed_folder(root: str) -> None:
    """Log that a named set is read, not the local folder of that name, if there is one."""
    if (root == "digits" or root in NAMED_ROOTS) and os.path.lexists(root):
        logger.warning(
            f"--data.root {root} is the data set of that name; for the local {root} give ./{root}"
        )


def resolve_root(root: str, root_md5: str | None = None) -> str:
    """The URL that a root's samples are read from: `Manifest.root` on this machine.

    A named root becomes its URL, one with an MD5 a verified local copy, a .zip its inside. Every
    rank that loads a saved manifest calls it, because a copy has another path on each machine.
    Blocks while fetching.

    Raises:
        DataError: There is no such file, or its MD5 differs.
    """
    if root == "digits":
        return _inside_zip(str(importlib.resources.files("lightship.data") / "digits.zip"))
    url, md5 = NAMED_ROOTS.get(root, (root, None))
    md5 = root_md5 or md5
    if md5:
        return inside_if_zip(str(storage.cached_download(url, md5)), is_download=True)
    return inside_if_zip(url)


def inside_if_zip(url: str, is_download: bool = False) -> str:
    """The URL of a zip's inside; of what is no zip its own.

    Args:
        url: Of a root.
        is_download: Whether it is a downloaded file, whose name tells nothing.
    """
    if is_download:
        with storage.open_binary(url) as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
    else:
        is_single = split(url)[2] is None
        is_zip = is_single and url.lower().endswith(".zip") and _is_file(url)
    return _inside_zip(url) if is_zip else url


def _inside_zip(url: str) -> str:
    is_plain = storage.is_remote(url) or "::" not in url
    return f"zip://::{url}" if is_plain else f"zip://::file://{storage.local_path(url).absolute()}"


def _is_file(url: str) -> bool:
    return storage.is_remote(url) or os.path.isfile(storage.local_path(url))
