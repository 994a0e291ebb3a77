"""Retry: what an error of a storage means, and how long to try again.

An answer that may be better next time (5xx, throttling, a reset, a cut body, silence) is asked for
again after pauses with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture
Blog, 2015) until the deadline; one that will not change (403, 404, a damaged archive) is raised at
once. Progress moves the deadline: it bounds silence, not the size of the work.
"""

import errno
import os
import random
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from lightship.exits import ConfigError, DataError, LightshipError, TimeoutExpired
from lightship.storage.urls import redact

T = TypeVar("T")


class NotFound(LightshipError, FileNotFoundError):
    """There is no such file, folder or bucket (exit 65)."""

    exit_name = "data"


class Denied(ConfigError):
    """The storage refuses access, or there are no credentials to ask with (exit 78)."""


class StorageTimeout(TimeoutExpired):
    """Faults that may pass outlasted the deadline (exit 74)."""


class WrongLength(OSError):
    """Other bytes came than the storage itself says there are: worth another try."""


@dataclass(frozen=True)
class Limits:
    """Bounds of every call; LIGHTSHIP_STORAGE_DEADLINE_S sets `total_s` and shortens the others."""

    connect_s: float = 5.0
    read_s: float = 15.0
    """Longest silence of an open connection before the request is made again."""
    total_s: float = 120.0
    """Longest time in which a call that fails is tried again, without progress."""
    probe_s: float = 15.0
    """Longest time `check_writable` tries."""
    attempts: int = 24
    backoff_s: float = 0.1
    backoff_cap_s: float = 8.0
    slowest_bytes_per_s: float = 2**18
    """A try that transfers n bytes may take total_s + n / this."""
    in_flight: int = 64
    """Requests at once, for file systems that are asynchronous."""
    threads: int = 8
    """Reads at once, for those that are not."""

    @classmethod
    def now(cls) -> "Limits":
        """The limits in force. Raises ConfigError for a deadline that is not a positive number."""
        text = os.environ.get("LIGHTSHIP_STORAGE_DEADLINE_S")
        if not text:
            return cls()
        try:
            total_s = float(text)
        except ValueError:
            total_s = 0.0
        if not 0 < total_s < float("inf"):
            raise ConfigError(f"LIGHTSHIP_STORAGE_DEADLINE_S is '{text}'; it must be seconds > 0")
        silent_s, probe_s = min(cls.read_s, total_s / 3), min(cls.probe_s, total_s)
        return cls(min(cls.connect_s, silent_s), silent_s, total_s, probe_s)


# Codes that come with a 4xx status and yet pass.
_PASSING_CODES = {
    "RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "OperationAborted",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_LASTING_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EFBIG, errno.ENOSYS, errno.ENOTEMPTY, errno.EEXIST,
}  # fmt: skip
_DAMAGED = (zipfile.BadZipFile, tarfile.ReadError, zlib.error, EOFError)
_NETWORK_PACKAGES = {
    "botocore", "aiobotocore", "aiohttp", "requests", "urllib3", "httpx", "httpcore", "gcsfs",
    "google", "azure", "huggingface_hub",
}  # fmt: skip


def http_answer(error: BaseException | None) -> tuple[int, str]:
    """(HTTP status, error code) behind an exception; (0, "") if no server spoke."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(response.get("Error", {}).get("Code", ""))
        for status in (getattr(error, "status", 0), getattr(response, "status_code", 0)):
            if isinstance(status, int) and status:
                return status, ""
        error = error.__cause__
    return 0, ""


def _is_network(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def _lasting(error: Exception, url: str) -> Exception | None:
    """What to raise for an error that will not pass; None for one that may."""
    if isinstance(error, LightshipError):
        return error
    # fsspec's http says "not found" of anything that went wrong; the cause knows better.
    if isinstance(error, FileNotFoundError) and _is_network(error.__cause__):
        assert isinstance(error.__cause__, Exception)
        error = error.__cause__
    (status, code), kind = http_answer(error), type(error).__name__
    place, reason = redact(url), _reason(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or status in (404, 410):
        return NotFound(f"{place} was not found ({reason})")
    if isinstance(error, IsADirectoryError):
        return NotFound(f"{place} is a folder; a file was expected")
    if code in _PASSING_CODES or status in (408, 429) or status >= 500:
        return None
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in kind:
        hint = "; credentials come from the environment (AWS_*; FSSPEC_S3_ANON=true for none)"
        return Denied(f"{place}: access denied ({reason}){hint if 's3' in place[:10] else ''}")
    if isinstance(error, _DAMAGED):
        return DataError(f"{place}: the archive is damaged ({reason})")
    if 400 <= status < 500 or kind in ("ParamValidationError", "InvalidURL", "NoRegionError"):
        return ConfigError(f"{place}: the storage refuses the request ({reason})")
    if isinstance(error, NotImplementedError):
        return ConfigError(f"{place}: this kind of storage cannot do that ({reason})")
    if isinstance(error, OSError):
        return ConfigError(f"{place}: {reason}") if error.errno in _LASTING_ERRNOS else None
    return None if _is_network(error) else error


def _reason(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))[:300]
    kind = http_answer(error)[1] or type(error).__name__
    return f"{kind}: {text}" if text else kind


class Patience:
    """The deadline of one call, moved by `progress`, and the pauses between its tries."""

    def __init__(self, url: str, size_bytes: int = 0, total_s: float | None = None):
        self.url, self.limits, self.tries, self.last = url, Limits.now(), 0, "no answer"
        self.total_s = total_s or self.limits.total_s
        self.quiet_s = self.total_s + size_bytes / self.limits.slowest_bytes_per_s
        self.progress()

    def progress(self) -> None:
        """Something arrived: the deadline starts anew."""
        now = time.monotonic()
        # A try that transfers may take its time; one that fails is not repeated so long.
        self.ends, self.last_try_ends = now + self.quiet_s, now + self.total_s

    def try_s(self, size_bytes: int) -> float:
        """Seconds after which one try that sends so many bytes has stalled, and is made again."""
        return self.limits.read_s + size_bytes / self.limits.slowest_bytes_per_s

    def left_s(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.ends - time.monotonic())

    def expired(self) -> StorageTimeout:
        """The error that says so."""
        within_s = self.quiet_s if not self.left_s() else self.total_s
        return StorageTimeout(
            f"{redact(self.url)}: no success within {within_s:.3g} s (failed tries: "
            f"{self.tries}; last: {self.last}); LIGHTSHIP_STORAGE_DEADLINE_S sets the bound"
        )

    def pause_s(self, error: Exception) -> float:
        """Seconds to wait before the next try. Raises what the call ends with if there is none."""
        lasting = _lasting(error, self.url)
        if lasting is error:
            raise error
        if lasting is not None:
            raise lasting from error
        self.tries, self.last = self.tries + 1, _reason(error)
        most_s = min(self.limits.backoff_cap_s, self.limits.backoff_s * 2.0**self.tries)
        pause_s = random.uniform(0, most_s)
        is_late = time.monotonic() + pause_s >= self.last_try_ends
        if self.tries >= self.limits.attempts or is_late:
            raise self.expired() from error
        return pause_s


def persist(operation: Callable[[], T], patience: Patience) -> T:
    """Tries until it works. A try that hangs is left to who waits: see `result_of`."""
    while True:
        try:
            return operation()
        except Exception as error:
            pause_s = patience.pause_s(error)
        time.sleep(pause_s)


def in_daemon(function: Callable[[], T]) -> "Future[T]":
    """Runs it on a thread that cannot keep the process alive, however long the call hangs."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def body() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, name="lightship-storage", daemon=True).start()
    return future


def result_of(future: "Future[T]", patience: Patience, grace_s: float = 1.0) -> T:
    """Waits as long as there is progress; the grace lets an inner deadline name the cause."""
    try:
        while not wait([future], patience.left_s() + grace_s).done:
            if not patience.left_s():
                raise patience.expired()
        return future.result()
    finally:
        future.cancel()
