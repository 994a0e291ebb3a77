"""Calls on files: what exists, downloads and writes, with deadlines and retries."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightship.errors import ConfigError, DataError, LightshipError
from lightship.storage import local
from lightship.storage.backend import FileInfo, Selection, length_of
from lightship.storage.errors import NotFound, StorageTimeout, TooLarge
from lightship.storage.file_table import FileTable
from lightship.storage.local import COPIED_BYTES, copy_stream, whole_file
from lightship.storage.parallel import in_daemon, run_within
from lightship.storage.reads import read_bytes, read_whole
from lightship.storage.registry import HTTP, call, open_binary, resolve
from lightship.storage.retry import Deadline, Limits
from lightship.storage.urls import base_name, cache_path, is_remote, join, local_path, redact, split


def make_ready(url: str) -> None:
    """Import and build the client that `url` needs, and connect, in the background.

    All that takes longer than a first read. Errors are left to the first call.
    """

    def connect() -> None:
        with contextlib.suppress(Exception):
            backend, path = resolve(url)
            backend.connect(Deadline(url), path)

    in_daemon(connect)


# ---- what exists -------------------------------------------------------------------------------


def list_files(
    url: str,
    max_files: int | None = None,
    skip: Callable[[str], bool] | None = None,
) -> list[FileInfo]:
    """As `list_table`, for few files, and without pipes, sockets and devices."""
    table = list_table(url, max_files, skip)
    if not table:
        raise _nothing_at(url)
    sizes = table.sizes.tolist()
    return [FileInfo(path, size) for path, size in zip(table, sizes, strict=True)]


def list_table(
    url: str,
    max_files: int | None = None,
    skip: Callable[[str], bool] | None = None,
) -> FileTable:
    """Every file under `url`, sorted by path; for a single file, one entry with an empty path.

    Args:
        url: The root.
        max_files: Stop when so many, or a few more, are found: for examples.
        skip: Whether to skip a folder, by its path below `url`; for local paths only.

    Returns:
        The files, among them broken links, which cannot be read.

    Raises:
        NotFound: Nothing exists; also for an empty folder, as object stores have none.
    """
    table = call(url, "files", Selection(max_files, skip))
    if not (table or table.special):
        raise _nothing_at(url)
    return table


def _nothing_at(url: str) -> NotFound:
    return NotFound(f"{redact(url)} is empty or does not exist")


def exists(url: str) -> bool:
    """Whether a file, or a folder with something in it, is at `url`. Raises Denied."""
    try:
        call(url, "size")
    except NotFound:
        return False
    return True


def modified_s(url: str) -> float:
    """When the file was written by the storage's own clock, in Unix time. Raises NotFound."""
    return call(url, "modified")


def read_small(url: str, max_bytes: int) -> bytes:
    """The whole file, which may come from anywhere: memory and time are bounded.

    Raises:
        TooLarge: It has more bytes; none is read.
        NotFound: There is none, or what is there is no plain file.
    """
    size = call(url, "size")  # None: a folder, which cannot be read, or a server that does not say
    if (size or 0) > max_bytes:
        raise TooLarge(f"{redact(url)} has {size:,} bytes; at most {max_bytes:,} are read")
    data = read_bytes(url) if size is None else read_whole(url, size)  # 0: also /proc's files
    if len(data) > max_bytes:
        raise TooLarge(f"{redact(url)} has {len(data):,} bytes; at most {max_bytes:,} are read")
    return data


def download(url: str, path: Path, md5: str | None = None, answer_s: float | None = None) -> None:
    """Copies the file to `path`, whole or not at all.

    Args:
        url: Of the file.
        path: Local; missing folders are made.
        md5: What its MD5 must be.
        answer_s: Time within which the storage must answer at all; None: that of every call.

    Raises:
        DataError: Its MD5 is not `md5`; nothing is left behind.
    """
    if answer_s is not None:
        call(url, "size", deadline=Deadline(url, total_s=answer_s))
    deadline = Deadline(url, COPIED_BYTES)

    def copy() -> None:
        with whole_file(path) as temporary_path:
            if split(url)[0] in HTTP:  # not every web server knows ranges
                call(url, "get_file", temporary_path, deadline=deadline)
            else:
                with open_binary(url, deadline) as source, temporary_path.open("wb") as out:
                    copy_stream(source, out, deadline)
            if md5:
                _check_md5(temporary_path, md5, url)

    run_within(deadline, copy)


def cached_download(url: str, md5: str) -> Path:
    """A verified local copy: `url` itself if local, else in `cache_path`, downloaded if missing."""
    if not is_remote(url):
        _check_md5(local_path(url), md5, url)
        return local_path(url)
    path = cache_path(md5.lower(), base_name(url))
    try:
        _check_md5(path, md5, url)
    except (NotFound, DataError):
        download(url, path, md5)
    return path


def _check_md5(path: Path, md5: str, url: str) -> None:
    file: Any = open_binary(str(path))
    with file:
        digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
    if digest.hexdigest() != md5.lower():
        raise DataError(f"{redact(url)} has MD5 {digest.hexdigest()}; {md5} was expected")


# ---- writing -----------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Writes the file whole: a crash at any moment leaves the old one or the new one.

    Local: a temporary name in the same folder, fsync, rename, fsync of the folder. Object stores:
    one put (parts, if large), then the size is checked. Makes missing folders.
    """
    call(url, "write", data, size=length_of(data))


def write_file(url: str, path: Path) -> None:
    """`write_bytes` from a local file, in pieces."""
    call(url, "write", path, size=length_of(path))


def move(url: str, to_url: str) -> None:
    """Renames a file within its folder, over another. Object stores: copies and removes it."""
    if is_remote(url):
        write_bytes(to_url, read_bytes(url))
        remove(url)
    else:
        os.replace(local_path(url), local_path(to_url))  # of a link, the link itself


def is_link(url: str) -> bool:
    """Whether a local path is a symbolic link."""
    return not is_remote(url) and local_path(url).is_symlink()


def refuse_link(url: str) -> None:
    """Raise ConfigError if a local folder is a link: lightship neither writes nor deletes below it.

    Whoever made the folder that holds the link chose where it leads. A link to a file does no harm:
    writing replaces it, and deleting deletes it.
    """
    if is_link(url):
        raise ConfigError(f"{url} is a link; replace it by a folder, or give another place")


def remove_temporaries(url: str) -> None:
    """Removes what killed writes have left directly in a local folder (object stores: nothing)."""
    if not is_remote(url):
        local.remove_temporaries(local_path(url))


def remove_folder(url: str) -> None:
    """Removes the empty folders at and below a local folder; object stores have none."""
    if is_remote(url):
        return
    for folder, _, _ in os.walk(local_path(url), topdown=False):  # follows no links
        with contextlib.suppress(OSError):  # holds a file, or is gone
            os.rmdir(folder)


def remove(url: str) -> None:
    """Removes the file if it exists."""
    call(url, "remove")


def check_writable(url: str, flag: str = "--run.output") -> None:
    """Writes, reads back and removes a probe under `url`.

    Within `Limits.probe_s` where a wrong address would only show by silence; on a local disk, which
    may be busy, within the time of every other write.

    Raises:
        ConfigError: It fails; names `flag`, the URL and the reason.
        StorageTimeout: The storage does not answer.
    """
    probe_url, data = join(url, f".{uuid.uuid4().hex}.probe"), uuid.uuid4().bytes
    try:
        limits = Limits.now()
        total_s = limits.probe_s if is_remote(url) else limits.total_s
        deadline = Deadline(probe_url, total_s=total_s)
        call(probe_url, "write", data, deadline=deadline)
        found = read_bytes(probe_url)
        call(probe_url, "remove", deadline=deadline)
    except StorageTimeout:
        raise  # may pass: worth a restart
    except LightshipError as error:
        why = str(error).replace(redact(probe_url), "a file there")
        raise ConfigError(f"{flag} {redact(url)} cannot be written: {why}") from error
    if found != data:
        raise ConfigError(f"{flag} {redact(url)} does not return what is written to it")
