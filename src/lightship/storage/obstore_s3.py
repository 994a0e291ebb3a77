"""S3 through obstore, where that is installed: listings and byte ranges, for much less CPU.

In Rust and outside the GIL a GET of an image costs a quarter, and a page of a listing a tenth, of
what they cost by s3fs (`make bench TABLES=s3_clients`). It makes only the first try: s3fs makes the
others, because errors.py understands its errors. Its endpoint, region and credentials are those of
s3fs, so there is one place to set them; where s3fs has settings that obstore cannot follow, s3fs
reads alone.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.asyn import sync

from lightship.errors import ConfigError
from lightship.extras import INSTALL
from lightship.storage.repeats import Repeats
from lightship.storage.retry import Deadline, Limits

if TYPE_CHECKING:
    from obstore.store import ClientConfig

_CREDENTIALS_HOLD = timedelta(minutes=1)
_MAX_DOUBT = 8
_MAX_BYTES = 64 * 2**20
_owner: int | None = None
"""The process with obstore's threads: a child after fork has none of them."""


class FirstTryFailed(OSError):
    """Worth another try, by s3fs."""


@contextlib.contextmanager
def _as_first_try() -> Iterator[None]:
    """Any error, and a panic of Rust, which is no Exception, as FirstTryFailed."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FirstTryFailed(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Access:
    """How buckets are reached, for another process of this node: see `registry.adopt`.

    Attributes:
        endpoint_url: Of the service.
        region: Its name.
        keys: (id, secret, token); None: requests are not signed.
        until: When the keys must be asked for again; None: they stay the same.
    """

    endpoint_url: str
    region: str
    keys: tuple[str, str, str | None] | None = field(repr=False)
    until: datetime | None

    @property
    def holds(self) -> bool:
        """Whether the keys can still be used."""
        return self.until is None or datetime.now(UTC) < self.until


class ObstoreS3:
    """The S3Client for the buckets that one file system of s3fs reaches.

    Args:
        fs: Gives the file system.
        access: Of another process; the file system is then asked for only when its keys have
            expired.
    """

    def __init__(self, fs: Callable[[], Any], access: Access | None = None) -> None:
        global _owner
        _owner = os.getpid()
        self._fs, self._given = fs, access
        self._stores: dict[str, Any] = {}
        self._succeeded, self._doubt = False, 0

    @classmethod
    def where_possible(cls, fs: Any) -> "ObstoreS3 | None":
        """None if obstore is not installed, not wanted, or would not do what s3fs does.

        Raises:
            ConfigError: LIGHTSHIP_S3_CLIENT names no client.
        """
        client = os.environ.get("LIGHTSHIP_S3_CLIENT") or "auto"
        is_installed = importlib.util.find_spec("obstore") is not None
        if client not in ("auto", "s3fs", "obstore"):
            raise ConfigError(
                f"LIGHTSHIP_S3_CLIENT is '{client}'; it must be auto, s3fs or obstore"
            )
        if client == "obstore" and not is_installed:
            raise ConfigError(
                f"LIGHTSHIP_S3_CLIENT is obstore, which is not installed: {INSTALL['obstore']}"
            )
        if not is_installed or client == "s3fs" or _owner not in (None, os.getpid()):
            return None
        # Settings that are not followed here: another certificate or proxy than the environment's,
        # another signature, keys and payers sent along with each request.
        is_special = set(fs.client_kwargs) - {"endpoint_url", "region_name"}
        config = fs.config_kwargs.keys() & {"proxies", "client_cert", "s3", "signature_version"}
        sends_more = fs.s3_additional_kwargs or fs.req_kw or fs.version_aware
        if is_special or config or sends_more:
            return None
        return cls(lambda: fs)

    @staticmethod
    def may_be_handed_over() -> bool:
        """Whether a process can use what `access` gives another one."""
        client = os.environ.get("LIGHTSHIP_S3_CLIENT") or "auto"
        is_installed = importlib.util.find_spec("obstore") is not None
        return is_installed and client != "s3fs" and _owner in (None, os.getpid())

    def connect(self, path: str) -> None:
        """As `S3Client.connect`."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            obstore.head(*self._place(path))

    def pages(
        self, deadline: Deadline, bucket: str, prefix: str, max_keys: int | None = None
    ) -> Iterator[dict[str, int]]:
        """As `S3Client.pages`.

        Raises:
            FirstTryFailed: Any error; nothing found, because s3fs says why; a page that comes
                again; or an empty object, which may mark a folder: obstore strips the slash that
                would show it.
        """
        import obstore

        is_empty, repeats = True, Repeats()
        with _as_first_try():
            store = self._store(bucket)
            for page in obstore.list(store, prefix or None, chunk_size=max_keys or 1000):
                if not all(item["size"] for item in page):
                    raise FirstTryFailed("an empty object")
                if page and repeats.has(page[0]["path"]):
                    raise FirstTryFailed("a page that was there before")
                deadline.progress()
                is_empty = False
                yield {item["path"]: item["size"] for item in page}
        if is_empty:
            raise FirstTryFailed("nothing found")
        self._succeeded = True

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> memoryview:
        """As `S3Client.read`, for an `end`.

        Raises:
            FirstTryFailed: Any error.
        """
        import obstore

        with _as_first_try():
            store, key = self._place(path)
            got = obstore.get_range(store, key, start=start, end=end)
        self._succeeded = True
        return memoryview(got)

    def may_try(self, size_bytes: int) -> bool:
        """Whether it has succeeded before, or not often failed where s3fs did not."""
        is_trusted = self._succeeded or self._doubt < _MAX_DOUBT
        return is_trusted and size_bytes <= _MAX_BYTES

    def s3fs_could(self) -> None:
        """Count that s3fs read what this could not."""
        self._doubt += 1

    def _place(self, path: str) -> tuple[Any, str]:
        if self._given:
            bucket, _, key = path.partition("/")
        else:
            bucket, key, _ = self._fs().split_path(path)
        return self._store(bucket), key

    def _store(self, bucket: str) -> Any:
        return self._stores.get(bucket) or self._stores.setdefault(bucket, self._open(bucket))

    def _open(self, bucket: str) -> Any:
        from obstore.store import S3Store

        access, limits = self._current(), Limits.now()
        options: ClientConfig = {
            "allow_http": not access.endpoint_url.startswith("https:"),
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "read_timeout": timedelta(seconds=limits.read_s),
            "timeout": timedelta(seconds=Deadline(bucket).try_s(_MAX_BYTES)),
        }
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle and access.endpoint_url.startswith("https:"):
            options["root_certificate"] = Path(bundle).read_bytes()
        is_signed = access.keys is not None
        return S3Store(
            bucket,
            endpoint=access.endpoint_url,
            region=access.region,
            virtual_hosted_style_request=False,
            client_options=options,
            retry_config={"max_retries": 0},
            **({"credential_provider": self._keys} if is_signed else {"skip_signature": True}),
        )

    def _keys(self) -> dict[str, Any]:
        """As obstore asks for them, whenever the last ones have expired."""
        access = self._current()
        assert access.keys is not None
        names = ("access_key_id", "secret_access_key", "token")
        return {**dict(zip(names, access.keys, strict=True)), "expires_at": access.until}

    def _current(self) -> Access:
        return self._given if self._given and self._given.holds else self.access()

    def access(self) -> Access:
        """How s3fs reaches buckets: with keys that it was given, or what its session finds. Blocks.

        Raises:
            FirstTryFailed: No credentials yet.
        """
        fs, until = self._fs(), None
        client = self._call(fs.set_session)
        keys = None if fs.anon else (fs.key, fs.secret, fs.token)
        if not fs.anon and not (fs.key and fs.secret):
            found = self._call(fs.session.get_credentials)
            if not found:
                raise FirstTryFailed("no credentials yet")
            keys = self._call(found.get_frozen_credentials)[:3]  # botocore renews them
            if hasattr(found, "refresh_needed"):
                until = datetime.now(UTC) + _CREDENTIALS_HOLD
        region = client.meta.region_name or "us-east-1"
        return Access(client.meta.endpoint_url, region, keys and tuple(keys), until)

    def _call(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return sync(self._fs().loop, function, timeout=Deadline("the credentials of S3").left_s())
