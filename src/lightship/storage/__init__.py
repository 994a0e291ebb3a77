"""Storage: files at any fsspec URL, with deadlines, retries (retry.py) and whole writes.

The only importer of fsspec. ahead.py reads in the background; every function here blocks, returns
what was asked for or raises within a bound, and may be called by any rank and thread, also in a
child after fork: file systems are built anew there, because neither their sockets nor their event
loop survive it.
"""

import contextlib
import hashlib
import io
import itertools
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from lightship.errors import ConfigError, DataError, LightshipError
from lightship.storage.archives import plain_names
from lightship.storage.backends import (
    PIECE_BYTES,
    Async,
    Data,
    FileInfo,
    Local,
    Remote,
    copy_stream,
    length_of,
    whole_file,
)
from lightship.storage.protocols import file_system_class
from lightship.storage.retry import (
    Deadline,
    Denied,
    Limits,
    NotFound,
    StorageTimeout,
    at_once,
    in_daemon,
    is_file_error,
    persist,
    result_of,
)
from lightship.storage.s3 import S3
from lightship.storage.urls import (
    base_name,
    cache_path,
    is_private,
    is_remote,
    join,
    local_path,
    redact,
    split,
)  # fmt: skip

__all__ = [
    "Data", "Denied", "FileInfo", "Limits", "NotFound", "Span", "StorageTimeout", "base_name",
    "cache_path", "cached_download", "check_writable", "download", "exists", "is_file_error",
    "is_private", "is_remote", "join", "list_files", "local_path", "make_ready", "modified_s",
    "open_binary", "read_bytes", "read_range", "read_spans", "redact", "remove", "size_bytes",
    "write_bytes", "write_file",
]  # fmt: skip

_HTTP = ("http", "https")


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; end None: to its end (then a cut object goes unnoticed)."""

    url: str
    start: int = 0
    end: int | None = None


class _RangeReader(io.RawIOBase):
    """A remote file as a seekable one; each read is a call with its own deadline and retries."""

    def __init__(self, url: str):
        self.url, self.name, self.at, self.size = url, base_name(url), 0, size_bytes(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        edges = [*range(self.at, end, PIECE_BYTES), max(self.at, end)]
        spans = [Span(self.url, *edge) for edge in itertools.pairwise(edges)]
        for span, data in zip(spans, read_spans(spans), strict=True):
            assert isinstance(data, bytes)
            buffer[span.start - self.at : span.start - self.at + len(data)] = data
        count = max(0, end - self.at)
        self.at += count
        return count


# ---- which storage a URL names -----------------------------------------------------------------

_LOCAL = Local()
_BACKENDS: dict[Any, Any] = {}
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE",
    "LIGHTSHIP_STORAGE_DEADLINE_S", "LIGHTSHIP_S3_CLIENT",
)  # fmt: skip


def resolve(url: str) -> tuple[Any, str]:
    """The kind of storage and the path within it. For storage's own modules."""
    protocol, head, rest = split(url)
    if not is_remote(url):
        return _LOCAL, str(local_path(url))
    kind = file_system_class(protocol, url)
    options = kind._get_kwargs_from_urls(head)
    # The process is part of the key: what a parent built hangs in a forked child.
    key = (os.getpid(), protocol, rest, *options.items(), *map(os.environ.get, _ENVIRONMENT))
    backend = _BACKENDS.get(key)
    if backend is None:
        patience = Deadline(url)
        build = partial(persist, partial(_build, kind, protocol, rest, options), patience)
        backend = _BACKENDS.setdefault(key, result_of(in_daemon(build), patience))
    return backend, kind._strip_protocol(head)


def _build(kind: Any, protocol: str, rest: str | None, options: dict[str, Any]) -> Any:
    if issubclass(kind, AbstractArchiveFileSystem):
        if rest is None:
            raise ConfigError(f"{protocol}:// needs its archive: {protocol}://PATH::ARCHIVE_URL")
        archive = kind(fo=open_binary(rest), skip_instance_cache=True)
        if protocol == "zip":
            plain_names(archive.zip)
        return Remote(archive, is_archive=True, is_read_only=True)
    if rest is not None:
        raise ConfigError(f"'{protocol}::' cannot be chained; archives can (zip://PATH::URL)")
    limits, options = Limits.now(), {**options, "skip_instance_cache": True}
    if not kind.async_impl:
        return Remote(kind(**options))
    options["use_listings_cache"] = False
    if protocol in _HTTP:
        import aiohttp

        timeout = aiohttp.ClientTimeout(None, None, limits.read_s, limits.connect_s)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
        options["headers"] = {"Accept-Encoding": "identity"}  # ranges count plain bytes
    if protocol not in ("s3", "s3a"):
        return Async(kind(**options), is_read_only=protocol in _HTTP)
    config: dict[str, Any] = {"connect_timeout": limits.connect_s, "read_timeout": limits.read_s}
    config |= {"max_pool_connections": limits.in_flight, "retries": {"total_max_attempts": 1}}
    config |= fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    file_system = kind(config_kwargs=config, **options)
    file_system.retries = 1  # ours are the only ones
    return S3(file_system)


def _run(url: str, method: str, *args: Any, size: int = 0, patience: Deadline | None = None) -> Any:
    backend, path = resolve(url)
    patience = patience or Deadline(url, size)
    operation = partial(getattr(backend, method), patience, path, *args)
    return result_of(in_daemon(partial(persist, operation, patience)), patience)


# ---- what the other rooms call -----------------------------------------------------------------


def make_ready(url: str) -> None:
    """Import and build the client that `url` needs, and connect, beside what the caller does.

    All that takes longer than a first read. What goes wrong is left to the first call to tell.
    """

    def connect() -> None:
        with contextlib.suppress(Exception):
            backend, path = resolve(url)
            backend.connect(Deadline(url), path)

    in_daemon(connect)


def list_files(
    url: str,
    most: int | None = None,
    skip: Callable[[str], bool] | None = None,
    special: bool = False,
) -> list[FileInfo]:
    """Every file under `url`, sorted by path; for a single file, one entry with an empty path.

    With `most` it stops looking where it has that many (or some more), for who needs examples.
    Local paths: `skip` says of a folder's path below `url` whether it is left out; `special` lists
    pipes, sockets and devices too; a link that leads nowhere is a file that cannot be read.

    Raises:
        NotFound: nothing is there; an empty folder counts as nothing, as object stores have none.
    """
    found = [file for file in _run(url, "files", most, skip) if special or not file.is_special]
    if not found:
        raise NotFound(f"{redact(url)} is empty or does not exist")
    return sorted(found, key=lambda file: file.path)


def exists(url: str) -> bool:
    """Whether a file, or a folder with something in it, is at `url`. Raises Denied."""
    try:
        _run(url, "size")
    except NotFound:
        return False
    return True


def size_bytes(url: str) -> int:
    """The size of the file at `url`. Raises NotFound, also for a folder."""
    size = _run(url, "size")
    if size is None:
        raise NotFound(f"{redact(url)} is a folder; a file was expected")
    return size


def modified_s(url: str) -> float:
    """When the file was written by the storage's own clock, in Unix time. Raises NotFound."""
    return _run(url, "modified")


def read_bytes(url: str) -> bytes:
    """The whole file."""
    (data,) = read_spans([Span(url)])
    assert isinstance(data, bytes)
    return data


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end), exactly. Raises DataError if the file is shorter."""
    (data,) = read_spans([Span(url, start, end)])
    assert isinstance(data, bytes)
    return data


def read_spans(
    spans: Sequence[Span], on_error: Literal["raise", "return"] = "raise"
) -> list[bytes | Exception]:
    """Many reads at once, as many in flight as `Limits` says; results in the order of `spans`.

    One GET a span, no HEAD. The first error is raised at once, and no more reads are begun. With
    on_error="return" a LightshipError stands in the place of what could not be read; after a
    StorageTimeout the reads not yet begun are given up with it.
    """
    results: list[bytes | Exception] = [b""] * len(spans)
    groups: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for index, span in enumerate(spans):
        assert 0 <= span.start <= (span.start if span.end is None else span.end), span
        if span.end == span.start:
            continue
        try:
            backend, path = resolve(span.url)
        except LightshipError as error:
            if on_error == "raise":
                raise
            results[index] = error
        else:
            groups.setdefault(id(backend), (backend, []))[1].append((index, path))
    for backend, places in groups.values():
        _read_group(backend, places, spans, results, on_error)
    return results


def _read_group(
    backend: Any,
    places: list[tuple[int, str]],
    spans: Sequence[Span],
    results: list[bytes | Exception],
    on_error: str,
) -> None:
    longest_bytes = max((spans[i].end or 0) - spans[i].start for i, _ in places)
    watch = Deadline(spans[places[0][0]].url, max(0, longest_bytes))
    expired: list[StorageTimeout] = []

    def read_one(place: tuple[int, str]) -> None:
        (index, path), span = place, spans[place[0]]
        patience = Deadline(span.url, span.end - span.start if span.end else 0)
        read = partial(backend.read, patience, path, span.start, span.end)
        try:
            if expired:
                raise expired[0]
            results[index] = bytes(persist(read, patience))
        except LightshipError as error:
            if on_error == "raise":
                raise
            results[index] = error
            if isinstance(error, StorageTimeout):
                expired.append(error)
        watch.progress()

    at_once(read_one, places, backend.reads_at_once(Limits.now()), watch)


def open_binary(url: str) -> BinaryIO:
    """The file, read-only and seekable.

    Remote reads have deadlines and retries; those of a local handle are the kernel's own.
    """
    backend, _ = resolve(url)
    if isinstance(backend, Local) or backend.is_archive:
        return _run(url, "open")
    return io.BufferedReader(_RangeReader(url), 2**20)


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Writes the file whole: after a crash at any moment there is the old one or the new one.

    Local: a temporary name in the same folder, fsync, rename, fsync of the folder. Object stores:
    one put (parts, if large), then the size is checked. Makes missing folders.
    """
    _run(url, "write", data, size=length_of(data))


def write_file(url: str, path: Path) -> None:
    """`write_bytes` from a local file, in pieces."""
    _run(url, "write", path, size=length_of(path))


def remove(url: str) -> None:
    """Removes the file; one that is not there is fine."""
    _run(url, "remove")


def download(url: str, path: Path, md5: str | None = None) -> None:
    """Copies the file to `path`, whole or not at all.

    Raises:
        DataError: its MD5 is not `md5`; nothing is left behind.
    """
    patience = Deadline(url)

    def copy() -> None:
        with whole_file(path) as temporary_path:
            if split(url)[0] in _HTTP:  # not every web server knows ranges
                _run(url, "get_file", temporary_path, size=size_bytes(url))
            else:
                with open_binary(url) as source, temporary_path.open("wb") as out:
                    copy_stream(source, out, patience)
            if md5:
                _check_md5(temporary_path, md5, url)

    result_of(in_daemon(copy), patience)


def cached_download(url: str, md5: str) -> Path:
    """A verified local copy: `url` itself if local, else in `cache_path`, downloaded if need be."""
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


def check_writable(url: str, flag: str = "--run.output") -> None:
    """Writes, reads back and removes a probe under `url`, within `Limits.probe_s`.

    Raises:
        ConfigError: it cannot be done; names `flag`, the URL and the reason.
        StorageTimeout: the storage does not answer.
    """
    probe_url, data = join(url, f".{uuid.uuid4().hex}.probe"), uuid.uuid4().bytes
    try:
        patience = Deadline(probe_url, total_s=Limits.now().probe_s)
        _run(probe_url, "write", data, patience=patience)
        found = read_bytes(probe_url)
        _run(probe_url, "remove", patience=patience)
    except StorageTimeout:
        raise  # an outage passes: whoever starts the process may try again
    except LightshipError as error:
        why = str(error).replace(redact(probe_url), "a file there")
        raise ConfigError(f"{flag} {redact(url)} cannot be written: {why}") from error
    if found != data:
        raise ConfigError(f"{flag} {redact(url)} does not give back what is written to it")
