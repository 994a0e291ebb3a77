"""Retry: what an error of a storage means, and how long to try again.

A transient error (5xx, throttling, a reset, a cut body, silence) is retried after pauses with full
jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015) until the
deadline; a permanent one (403, 404, a damaged archive) is raised at once. `_TABLE` says which is
which. Progress moves the deadline: it bounds silence, not the size of the work.
"""

import errno
import os
import random
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import TypeVar

from lightship.errors import ConfigError, DataError, LightshipError, TimeoutExpired
from lightship.storage.urls import redact

T = TypeVar("T")
R = TypeVar("R")
_GRACE_S = 1.0


class NotFound(LightshipError, FileNotFoundError):
    """There is no such file, folder or bucket (exit 65)."""

    exit_name = "data"


class Refused(ConfigError):
    """The storage refuses the request, maybe for this file alone (exit 78)."""


class Denied(ConfigError):
    """The storage denies access, maybe to this file alone (exit 78)."""


class BadCredentials(Denied):
    """There are no credentials, or the storage does not accept them, for any file (exit 78)."""


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


# ---- which errors are permanent ----------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What an error says of itself."""

    error: Exception
    status: int
    code: str

    def is_a(self, *kinds: type[Exception] | str) -> bool:
        """Whether it is one of these types, or of a type with one of these names."""
        types = tuple(kind for kind in kinds if not isinstance(kind, str))
        return isinstance(self.error, types) or type(self.error).__name__ in kinds

    def is_errno(self, *numbers: int) -> bool:
        return isinstance(self.error, OSError) and self.error.errno in numbers


_TRANSIENT_CODES = {  # although their status is a 4xx
    "RequestTimeout", "RequestTimeoutException", "IncompleteBody", "BadDigest", "OperationAborted",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_CREDENTIAL_CODES = {
    "AuthFailure", "AuthorizationHeaderMalformed", "ExpiredToken", "ExpiredTokenException",
    "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity", "InvalidToken",
    "NotSignedUp", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "UnrecognizedClientException",
}  # fmt: skip
_S3_HINT = "; credentials come from the environment (AWS_*; FSSPEC_S3_ANON=true for none)"
_DENIED = "{place}: access denied ({reason}){hint}"

# The first row that matches holds: (matches, what is raised at once, its text). None: transient,
# tried again. An error of no row is a defect and raised as it is.
_TABLE: list[tuple[Callable[[_Seen], bool], type[LightshipError] | None, str]] = [
    (lambda e: e.is_a(FileNotFoundError, NotADirectoryError) or e.status in (404, 410),
     NotFound, "{place} was not found ({reason})"),
    (lambda e: e.is_a(IsADirectoryError), NotFound, "{place} is a folder; a file was expected"),
    (lambda e: e.code in _TRANSIENT_CODES or e.status in (408, 429) or e.status >= 500, None, ""),
    (lambda e: e.code in _CREDENTIAL_CODES or e.status in (401, 407)
     or "Credential" in type(e.error).__name__, BadCredentials, _DENIED),
    (lambda e: e.is_a(PermissionError) or e.status == 403, Denied, _DENIED),
    (lambda e: 400 <= e.status < 500 or e.is_a("ParamValidationError", "InvalidURL"),
     Refused, "{place}: the storage refuses the request ({reason})"),
    (lambda e: e.is_a("NoRegionError"), ConfigError, "{place}: no region is set ({reason})"),
    (lambda e: e.is_a(zipfile.BadZipFile, tarfile.ReadError, zlib.error, EOFError),
     DataError, "{place}: the archive is damaged ({reason})"),
    (lambda e: e.is_a(NotImplementedError),
     ConfigError, "{place}: this kind of storage cannot do that ({reason})"),
    (lambda e: e.is_errno(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENXIO, errno.ENODEV),
     NotFound, "{place} cannot be opened ({reason})"),
    (lambda e: e.is_a(UnicodeError) or (e.is_a(ValueError) and "null byte" in str(e.error)),
     NotFound, "{place} is no possible name of a file ({reason})"),
    (lambda e: e.is_errno(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.EFBIG,
                          errno.ENOSYS, errno.ENOTEMPTY, errno.EEXIST),
     ConfigError, "{place}: {reason}"),
    (lambda e: e.is_a(OSError) or _is_network(e.error), None, ""),
]  # fmt: skip


def is_file_error(error: BaseException) -> bool:
    """Whether the fault may be that of the file alone, so that `on_error skip` may leave it out."""
    if isinstance(error, (Denied, Refused)):
        return not isinstance(error, BadCredentials)
    return isinstance(error, LightshipError) and error.exit_name == DataError.exit_name


def _permanent(error: Exception, url: str) -> Exception | None:
    """What to raise for a permanent error; None for a transient one."""
    if isinstance(error, LightshipError):
        return error
    # fsspec's http says "not found" of anything that went wrong; the cause knows better.
    if isinstance(error, FileNotFoundError) and _is_network(error.__cause__):
        assert isinstance(error.__cause__, Exception)
        error = error.__cause__
    seen = _Seen(error, *http_answer(error))
    for matches, kind, text in _TABLE:
        if matches(seen):
            place = redact(url)
            hint = _S3_HINT if "s3" in place[:10] else ""
            told = text.format(place=place, reason=_reason(error), hint=hint)
            return kind(told) if kind is not None else None
    return error


def _reason(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))[:300]
    kind = http_answer(error)[1] or type(error).__name__
    return f"{kind}: {text}" if text else kind


class Deadline:
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
        permanent = _permanent(error, self.url)
        if permanent is error:
            raise error
        if permanent is not None:
            raise permanent from error
        self.tries, self.last = self.tries + 1, _reason(error)
        most_s = min(self.limits.backoff_cap_s, self.limits.backoff_s * 2.0**self.tries)
        pause_s = random.uniform(0, most_s)
        is_late = time.monotonic() + pause_s >= self.last_try_ends
        if self.tries >= self.limits.attempts or is_late:
            raise self.expired() from error
        return pause_s


def persist(operation: Callable[[], T], patience: Deadline) -> T:
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


def result_of(future: "Future[T]", patience: Deadline, grace_s: float = _GRACE_S) -> T:
    """Waits as long as there is progress; the grace lets an inner deadline name the cause."""
    try:
        while not wait([future], patience.left_s() + grace_s).done:
            if not patience.left_s():
                raise patience.expired()
        return future.result()
    finally:
        future.cancel()


def at_once(
    function: Callable[[T], R], items: Iterable[T], most: int, patience: Deadline
) -> list[R]:
    """function(item) of each, in their order, by up to `most` threads.

    The first error is raised at once, and no more items are begun; those under way are not waited
    for.
    """
    jobs = list(enumerate(items))
    todo = iter(jobs)
    done: dict[int, R] = {}

    def work() -> None:
        try:
            for place, item in todo:
                done[place] = function(item)
        finally:
            list(todo)  # after an error the others begin no more

    working = {in_daemon(work) for _ in range(min(most, len(jobs)))}
    try:
        while working:
            bound_s = patience.left_s() + _GRACE_S
            ended, working = wait(working, bound_s, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            if working and not patience.left_s():
                raise patience.expired()
    finally:
        list(todo)
    return [done[place] for place in sorted(done)]
