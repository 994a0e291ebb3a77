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


class ObstoreS3:
    """The S3Client for the buckets that one file system of s3fs reaches.

    Args:
        fs: The file system.
    """

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._stores: dict[str, Any] = {}
        self._succeeded, self._doubt = False, 0

    @classmethod
    def where_possible(cls, fs: Any) -> "ObstoreS3 | None":
        """None if obstore is not installed, not wanted, or would not do what s3fs does.

        Raises:
            ConfigError: LIGHTSHIP_S3_CLIENT names no client.
        """
        global _owner
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
        _owner = os.getpid()
        return cls(fs)

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
        try:
            store = self._store(bucket)
            for page in obstore.list(store, prefix or None, chunk_size=max_keys or 1000):
                if not all(item["size"] for item in page):
                    raise FirstTryFailed("an empty object")
                if page and repeats.has(page[0]["path"]):
                    raise FirstTryFailed("a page that was there before")
                deadline.progress()
                is_empty = False
                yield {item["path"]: item["size"] for item in page}
        except Exception as error:
            raise FirstTryFailed(f"{type(error).__name__}: {error}") from error
        if is_empty:
            raise FirstTryFailed("nothing found")
        self._succeeded = True

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> memoryview:
        """As `S3Client.read`, for an `end`.

        Raises:
            FirstTryFailed: Any error.
        """
        import obstore

        try:
            store, key = self._place(path)
            got = obstore.get_range(store, key, start=start, end=end)
        except Exception as error:
            raise FirstTryFailed(f"{type(error).__name__}: {error}") from error
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
        bucket, key, _ = self.fs.split_path(path)
        return self._store(bucket), key

    def _store(self, bucket: str) -> Any:
        return self._stores.get(bucket) or self._stores.setdefault(bucket, self._open(bucket))

    def _open(self, bucket: str) -> Any:
        from obstore.store import S3Store

        client, limits = self._call(self.fs.set_session), Limits.now()
        options: ClientConfig = {
            "allow_http": not client.meta.endpoint_url.startswith("https:"),
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "read_timeout": timedelta(seconds=limits.read_s),
            "timeout": timedelta(seconds=Deadline(bucket).try_s(_MAX_BYTES)),
        }
        endpoint, bundle = client.meta.endpoint_url, os.environ.get("AWS_CA_BUNDLE")
        if bundle and endpoint.startswith("https:"):
            options["root_certificate"] = Path(bundle).read_bytes()
        return S3Store(
            bucket,
            endpoint=endpoint,
            region=client.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            client_options=options,
            retry_config={"max_retries": 0},
            **self._signing(),
        )

    def _signing(self) -> dict[str, Any]:
        """The credentials of s3fs: keys that it was given, or what its session finds."""
        fs, found = self.fs, None
        if not (fs.key and fs.secret) and not fs.anon:
            found = self._call(fs.session.get_credentials)
        if fs.anon:
            return {"skip_signature": True}
        if not (fs.key or found):
            raise FirstTryFailed("no credentials yet")

        def current() -> dict[str, Any]:
            keys = (fs.key, fs.secret, fs.token)
            if found is not None:
                keys = self._call(found.get_frozen_credentials)[:3]  # botocore renews them
            names = ("access_key_id", "secret_access_key", "token")
            until = datetime.now(UTC) + _CREDENTIALS_HOLD
            return {**dict(zip(names, keys, strict=True)), "expires_at": until}

        return {"credential_provider": current}

    def _call(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return sync(self.fs.loop, function, timeout=Deadline("the credentials of S3").left_s())
