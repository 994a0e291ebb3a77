"""The calls of the other rooms: a backend's methods with deadlines and retries."""

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
from fsspec.core import strip_protocol

from lightship.errors import ConfigError, DataError, LightshipError
from lightship.storage.archives import Archive
from lightship.storage.backend import PIECE_BYTES, Backend, Data, FileInfo, Selection, length_of
from lightship.storage.errors import NotFound, StorageTimeout
from lightship.storage.fsspec_backend import Async, Remote, file_system_class, url_options
from lightship.storage.local import Local, copy_stream, whole_file
from lightship.storage.parallel import in_daemon, parallel_map, run_within
from lightship.storage.retry import Deadline, Limits, with_retries
from lightship.storage.s3 import S3
from lightship.storage.urls import base_name, cache_path, is_remote, join, local_path, redact, split

_HTTP = ("http", "https")
_LOCAL = Local()
_BACKENDS: dict[Any, Backend] = {}
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE",
    "LIGHTSHIP_STORAGE_DEADLINE_S", "LIGHTSHIP_S3_CLIENT",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; end None: to its end (then a cut object goes unnoticed)."""

    url: str
    start: int = 0
    end: int | None = None

    @property
    def size_bytes(self) -> int:
        """0 where that is unknown."""
        return 0 if self.end is None else self.end - self.start


# ---- which storage a URL names -----------------------------------------------------------------


def resolve(url: str) -> tuple[Backend, str]:
    """The backend of a URL and the path within it. For storage's own modules."""
    protocol, head, rest = split(url)
    if not is_remote(url):
        return _LOCAL, str(local_path(url))
    kind = file_system_class(protocol, url)
    options = url_options(kind, head)
    # Neither sockets nor event loop of a parent survive a fork: the process is part of the key.
    key = (os.getpid(), protocol, rest, *options.items(), *map(os.environ.get, _ENVIRONMENT))
    backend = _BACKENDS.get(key)
    if backend is None:
        deadline = Deadline(url)
        build = partial(_build, kind, protocol, rest, options)
        built = run_within(deadline, partial(with_retries, build, deadline))
        backend = _BACKENDS.setdefault(key, built)
    return backend, strip_protocol(head)


def _build(kind: Any, protocol: str, rest: str | None, options: dict[str, Any]) -> Backend:
    options["skip_instance_cache"] = True
    if issubclass(kind, AbstractArchiveFileSystem):
        if rest is None:
            raise ConfigError(f"{protocol}:// needs its archive: {protocol}://PATH::ARCHIVE_URL")
        return Archive(kind(fo=open_binary(rest), **options))
    if rest is not None:
        raise ConfigError(f"'{protocol}::' cannot be chained; archives can (zip://PATH::URL)")
    if not kind.async_impl:
        return Remote(kind(**options))
    limits, options["use_listings_cache"] = Limits.now(), False
    if protocol in _HTTP:
        import aiohttp  # needed by no other storage

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


def _run(url: str, method: str, *args: Any, size: int = 0, deadline: Deadline | None = None) -> Any:
    backend, path = resolve(url)
    deadline = deadline or Deadline(url, size)
    operation = partial(getattr(backend, method), deadline, path, *args)
    return run_within(deadline, partial(with_retries, operation, deadline))


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
    special: bool = False,
) -> list[FileInfo]:
    """Every file under `url`, sorted by path; for a single file, one entry with an empty path.

    Args:
        url: The root.
        max_files: Stop when so many, or a few more, are found: for examples.
        skip: Whether to skip a folder, by its path below `url`; for local paths only.
        special: Local paths: include pipes, sockets and devices. A broken link is always included,
            as a file that cannot be read.

    Raises:
        NotFound: Nothing exists; also for an empty folder, as object stores have none.
    """
    listed = _run(url, "files", Selection(max_files, skip))
    found = [file for file in listed if special or not file.is_special]
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


# ---- reading -----------------------------------------------------------------------------------


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
    """Many reads at once, `Backend.max_reads` in flight; results in the order of `spans`.

    One GET a span, no HEAD. The first error is raised at once, and no more reads are begun. With
    on_error="return" a LightshipError takes the place of what could not be read; after a
    StorageTimeout the reads that have not begun get that error too.
    """
    results: list[bytes | Exception] = [b""] * len(spans)
    places: list[tuple[int, Backend, str]] = []
    expired: list[StorageTimeout] = []

    def fail(index: int, error: LightshipError) -> None:
        if on_error == "raise":
            raise error
        results[index] = error
        if isinstance(error, StorageTimeout):
            expired.append(error)

    def read_one(place: tuple[int, Backend, str]) -> None:
        index, backend, path = place
        try:
            if expired:
                raise expired[0]
            results[index] = bytes(read_span(backend, path, spans[index]))
        except LightshipError as error:
            fail(index, error)

    for index, span in enumerate(spans):
        assert 0 <= span.start <= (span.start if span.end is None else span.end), span
        if span.end != span.start:
            try:
                places.append((index, *resolve(span.url)))
            except LightshipError as error:
                fail(index, error)
    if places:
        max_reads = max(backend.max_reads for _, backend, _ in places)
        deadline = Deadline(spans[places[0][0]].url, max(span.size_bytes for span in spans))
        parallel_map(read_one, places, max_reads, deadline)
    return results


def read_span(backend: Backend, path: str, span: Span) -> Data:
    """One read with retries, in this thread. For storage's own modules."""
    deadline = Deadline(span.url, span.size_bytes)
    return with_retries(partial(backend.read, deadline, path, span.start, span.end), deadline)


def open_binary(url: str) -> BinaryIO:
    """The file, read-only and seekable.

    Remote reads have deadlines and retries; those of a local handle are the kernel's.
    """
    if isinstance(resolve(url)[0], Local | Archive):
        return _run(url, "open")
    return io.BufferedReader(_RangeReader(url), 2**20)


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


def download(url: str, path: Path, md5: str | None = None) -> None:
    """Copies the file to `path`, whole or not at all.

    Raises:
        DataError: Its MD5 is not `md5`; nothing is left behind.
    """
    deadline = Deadline(url)

    def copy() -> None:
        with whole_file(path) as temporary_path:
            if split(url)[0] in _HTTP:  # not every web server knows ranges
                _run(url, "get_file", temporary_path, size=size_bytes(url))
            else:
                with open_binary(url) as source, temporary_path.open("wb") as out:
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
    _run(url, "write", data, size=length_of(data))


def write_file(url: str, path: Path) -> None:
    """`write_bytes` from a local file, in pieces."""
    _run(url, "write", path, size=length_of(path))


def remove(url: str) -> None:
    """Removes the file if it exists."""
    _run(url, "remove")


def check_writable(url: str, flag: str = "--run.output") -> None:
    """Writes, reads back and removes a probe under `url`, within `Limits.probe_s`.

    Raises:
        ConfigError: It fails; names `flag`, the URL and the reason.
        StorageTimeout: The storage does not answer.
    """
    probe_url, data = join(url, f".{uuid.uuid4().hex}.probe"), uuid.uuid4().bytes
    try:
        deadline = Deadline(probe_url, total_s=Limits.now().probe_s)
        _run(probe_url, "write", data, deadline=deadline)
        found = read_bytes(probe_url)
        _run(probe_url, "remove", deadline=deadline)
    except StorageTimeout:
        raise  # may pass: worth a restart
    except LightshipError as error:
        why = str(error).replace(redact(probe_url), "a file there")
        raise ConfigError(f"{flag} {redact(url)} cannot be written: {why}") from error
    if found != data:
        raise ConfigError(f"{flag} {redact(url)} does not return what is written to it")
