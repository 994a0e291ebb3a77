"""The backend of a URL, built once a process, and calls of it with deadlines and retries.

For storage's own modules, but for `open_binary` and `size_bytes`.
"""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import fsspec
from fsspec.core import strip_protocol

from lightship.errors import ConfigError
from lightship.redaction import is_redacted
from lightship.storage.archives import Archive, TarArchive, ZipArchive
from lightship.storage.backend import PIECE_BYTES, Backend, Data, Span
from lightship.storage.errors import NotFound
from lightship.storage.fsspec_backend import Async, Remote, file_system_class, url_options
from lightship.storage.local import Local
from lightship.storage.obstore_s3 import Access, ObstoreS3
from lightship.storage.parallel import parallel_map, run_within
from lightship.storage.retry import Deadline, Limits, with_retries
from lightship.storage.s3 import S3
from lightship.storage.s3_settings import check_settings
from lightship.storage.urls import base_name, is_remote, local_path, redact, split
from lightship.storage.web import Web

HTTP = ("http", "https")
_LOCAL = Local()
_ARCHIVES: dict[str, Callable[[BinaryIO, str], Archive]] = {"zip": ZipArchive, "tar": TarArchive}
_BACKENDS: dict[Any, Backend] = {}
_ANSWERED: set[Backend] = set()
_IN_BUCKET = re.compile(r"s3a?://[\w.-]+(?=/|$)")  # without keys or the ARN of an access point
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE",
    "LIGHTSHIP_STORAGE_DEADLINE_S", "LIGHTSHIP_S3_CLIENT",
)  # fmt: skip


def resolve(url: str) -> tuple[Backend, str]:
    """The backend of a URL and the path within it."""
    protocol, head, rest = split(url)
    if not is_remote(url):
        return _LOCAL, str(local_path(url))
    if is_redacted(url):
        raise ConfigError(
            f"{url} comes from a stored configuration, which holds no passwords and signatures: "
            "give the URL again"
        )
    if backend := _BACKENDS.get(_of_bucket(url)):
        return backend, url.partition("://")[2].rstrip("/")
    is_archive = protocol in _ARCHIVES
    kind = None if is_archive else file_system_class(protocol, url)
    options = {} if is_archive else url_options(kind, head)
    # Neither sockets nor event loop of a parent survive a fork: the process is part of the key.
    key = (os.getpid(), protocol, rest, *options.items(), *map(os.environ.get, _ENVIRONMENT))
    backend = _BACKENDS.get(key)
    if backend is None:
        deadline = Deadline(url)
        build = partial(_build, kind, protocol, rest, options)
        built = run_within(deadline, partial(with_retries, build, deadline))
        backend = _BACKENDS.setdefault(key, built)
    return backend, head.partition("://")[2].strip("/") if is_archive else strip_protocol(head)


def _build(kind: Any, protocol: str, rest: str | None, options: dict[str, Any]) -> Backend:
    options["skip_instance_cache"] = True
    if protocol in _ARCHIVES:
        if rest is None:
            raise ConfigError(f"{protocol}:// needs its archive: {protocol}://PATH::ARCHIVE_URL")
        return _ARCHIVES[protocol](open_binary(rest), redact(rest))
    if rest is not None:
        raise ConfigError(f"'{protocol}::' cannot be chained; archives can (zip://PATH::URL)")
    if not kind.async_impl:
        return Remote(kind(**options))
    limits, options["use_listings_cache"] = Limits.now(), False
    if protocol in HTTP:
        return Web(kind, options, limits)
    if protocol not in ("s3", "s3a"):
        return Async(kind(**options))
    file_system = _s3fs(kind, options, limits)
    return S3(lambda: file_system)


def _s3fs(kind: Any, options: dict[str, Any], limits: Limits) -> Any:
    config: dict[str, Any] = {"connect_timeout": limits.connect_s, "read_timeout": limits.read_s}
    config |= {"max_pool_connections": limits.in_flight, "retries": {"total_max_attempts": 1}}
    config |= fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    file_system = kind(config_kwargs=config, **options)
    file_system.retries = 1  # ours are the only ones
    check_settings(file_system)
    return file_system


def may_hand_over(url: str) -> bool:
    """Whether a data worker need not find out itself how to reach `url`: see `adopt`."""
    return bool(_IN_BUCKET.match(url)) and ObstoreS3.may_be_handed_over()


def access(url: str) -> Access | None:
    """How this process reaches `url`, for its data worker; None: it has to find out. Blocks.

    Errors are left to the worker's first read.
    """
    if not may_hand_over(url):
        return None
    with contextlib.suppress(Exception):
        backend, _ = resolve(url)
        assert isinstance(backend, S3)
        return run_within(Deadline(url), backend.access)
    return None


def adopt(url: str, access: Access | None) -> None:
    """Reach the bucket of `url` as another process does, until that fails. Does not block."""
    if access is None or not may_hand_over(url):
        return

    def build() -> Any:
        protocol, head, _ = split(url)
        kind = file_system_class(protocol, url)
        options = url_options(kind, head) | {"skip_instance_cache": True}
        return _s3fs(kind, options | {"use_listings_cache": False}, Limits.now())

    _BACKENDS.setdefault(_of_bucket(url), S3(build, access))


def _of_bucket(url: str) -> tuple[int, str] | None:
    """The key of what is adopted, for a URL in a bucket."""
    found = _IN_BUCKET.match(url)
    return (os.getpid(), found[0]) if found else None


def call(url: str, method: str, *args: Any, size: int = 0, deadline: Deadline | None = None) -> Any:
    """`method` of the backend of `url`, with a deadline and retries."""
    backend, path = resolve(url)
    deadline = deadline or Deadline(url, size)
    deadline.is_first = backend not in _ANSWERED
    operation = partial(getattr(backend, method), deadline, path, *args)
    result = run_within(deadline, partial(with_retries, operation, deadline))
    _ANSWERED.add(backend)
    return result


def size_bytes(url: str) -> int:
    """The size of the file at `url`. Raises NotFound, also for a folder."""
    size = call(url, "size")
    if size is None:
        raise NotFound(f"{redact(url)} is a folder; a file was expected")
    return size


def read_span(backend: Backend, path: str, span: Span, together_bytes: int = 0) -> Data:
    """One read with retries, in this thread.

    Args:
        backend: Of its file.
        path: Within the backend.
        span: What is read.
        together_bytes: Of all reads that begin at once and share the line.
    """
    size = max(span.size_bytes, together_bytes)
    deadline = Deadline(span.url, size, is_first=backend not in _ANSWERED)
    data = with_retries(partial(backend.read, deadline, path, span.start, span.end), deadline)
    _ANSWERED.add(backend)
    return data


def open_binary(url: str, deadline: Deadline | None = None) -> BinaryIO:
    """The file, read-only and seekable.

    Reads that fail are tried again until a deadline. A local one that hangs is the kernel's.

    Args:
        url: Of the file.
        deadline: Of the call that it is read for: each piece that comes is progress.
    """
    backend, path = resolve(url)
    if isinstance(backend, Local | Archive):
        return call(url, "open")
    return io.BufferedReader(_RangeReader(url, backend, path, deadline), 2**20)


class _RangeReader(io.RawIOBase):
    """A remote file as a seekable one; each read is a call with its own deadline and retries."""

    def __init__(self, url: str, backend: Backend, path: str, outer: Deadline | None):
        self.url, self.name, self.at, self.size = url, base_name(url), 0, size_bytes(url)
        self.backend, self.path, self.outer = backend, path, outer

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
        together_bytes = max(0, end - self.at)

        def read(span: Span) -> Data:
            data = read_span(self.backend, self.path, span, together_bytes)
            if self.outer:
                self.outer.progress()
            return data

        deadline = Deadline(self.url, together_bytes)
        pieces = parallel_map(read, spans, self.backend.max_reads, deadline)
        for span, data in zip(spans, pieces, strict=True):
            buffer[span.start - self.at : span.start - self.at + len(data)] = data
        count = max(0, end - self.at)
        self.at += count
        return count
