"""S3 through obstore, where that is installed: listings and byte ranges, for much less CPU.

In Rust and off Python's lock a GET of an image costs a quarter, and a page of a listing a tenth, of
what they cost by s3fs (`make bench TABLES=s3_clients`). It is only the first try: what goes wrong
in it is tried again by s3fs, whose errors retry.py understands. Its endpoint, region and
credentials are those that s3fs has found, so there is one place to set them; where s3fs is set up
in a way that this cannot follow, s3fs reads alone.
"""

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import ConfigError
from lightship.storage.retry import Deadline, Limits, result_of

if TYPE_CHECKING:
    from obstore.store import ClientConfig

_CREDENTIALS_HOLD = timedelta(minutes=1)
_ENOUGH_DOUBT = 8
_LARGEST_BYTES = 64 * 2**20
_owner: int | None = None
"""The process whose threads obstore runs on: a child after fork has none of them."""


class FirstTryFailed(OSError):
    """Worth another try, by s3fs."""


class ObstoreS3:
    """The buckets that one s3fs file system reaches.

    Args:
        fs: The file system.
    """

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._stores: dict[str, Any] = {}
        self._succeeded, self._doubt = False, 0

    @classmethod
    def where_possible(cls, fs: Any) -> "ObstoreS3 | None":
        """Or None: where obstore is not installed, not wanted, or would not do what s3fs does.

        Raises:
            ConfigError: LIGHTSHIP_S3_CLIENT names no client.
        """
        global _owner
        client = os.environ.get("LIGHTSHIP_S3_CLIENT") or "auto"
        is_there = importlib.util.find_spec("obstore") is not None
        if client not in ("auto", "s3fs", "obstore"):
            raise ConfigError(
                f"LIGHTSHIP_S3_CLIENT is '{client}'; it must be auto, s3fs or obstore"
            )
        if client == "obstore" and not is_there:
            raise ConfigError(
                "LIGHTSHIP_S3_CLIENT is obstore, which is not installed: "
                "pip install 'lightship[obstore]'"
            )
        if not is_there or client == "s3fs" or _owner not in (None, os.getpid()):
            return None
        # What a bucket may be reached by that is not followed here: another certificate or proxy
        # than the environment's, another signature, keys and payers sent along with each request.
        is_special = set(fs.client_kwargs) - {"endpoint_url", "region_name"}
        config = fs.config_kwargs.keys() & {"proxies", "client_cert", "s3", "signature_version"}
        asks = fs.s3_additional_kwargs or fs.req_kw or fs.version_aware
        if is_special or config or asks:
            return None
        _owner = os.getpid()
        return cls(fs)

    def connect(self, path: str) -> None:
        """Open the bucket of "BUCKET/KEY". Blocks."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            obstore.head(*self._place(path))

    def pages(self, bucket: str, prefix: str) -> Iterator[dict[str, int]]:
        """Key -> bytes of the objects below "PREFIX/", 1,000 at once. Blocks.

        Args:
            bucket: Its name.
            prefix: Empty, or with a slash at its end.

        Raises:
            FirstTryFailed: Whatever went wrong, or there is an empty object: it may be what marks a
                folder, and obstore does not tell.
        """
        import obstore

        try:
            store = self._store(bucket)
            for page in obstore.list(store, prefix or None, chunk_size=1000):
                if not all(item["size"] for item in page):
                    raise FirstTryFailed("an empty object")
                yield {item["path"]: item["size"] for item in page}
        except FirstTryFailed:
            raise
        except Exception as error:
            raise FirstTryFailed(f"{type(error).__name__}: {error}") from error
        self._succeeded = True

    def read(self, path: str, start: int, end: int) -> memoryview:
        """Bytes [start, end) of "BUCKET/KEY"; fewer if the object is shorter. Blocks.

        Raises:
            FirstTryFailed: Whatever went wrong.
        """
        import obstore

        try:
            store, key = self._place(path)
            got = obstore.get_range(store, key, start=start, end=end)
        except Exception as error:
            raise FirstTryFailed(f"{type(error).__name__}: {error}") from error
        self._succeeded = True
        return memoryview(got)

    def may_try(self, size_bytes: int = 0) -> bool:
        """Whether it has succeeded before, or not yet often failed where s3fs did not."""
        is_trusted = self._succeeded or self._doubt < _ENOUGH_DOUBT
        return is_trusted and size_bytes <= _LARGEST_BYTES

    def s3fs_could(self) -> None:
        """Take note that s3fs read what this could not."""
        self._doubt += 1

    def _place(self, path: str) -> tuple[Any, str]:
        bucket, key, _ = self.fs.split_path(path)
        return self._store(bucket), key

    def _store(self, bucket: str) -> Any:
        return self._stores.get(bucket) or self._stores.setdefault(bucket, self._open(bucket))

    def _open(self, bucket: str) -> Any:
        from obstore.store import S3Store

        client, limits = self._ask(self.fs.set_session()), Limits.now()
        credentials = client._get_credentials()

        def current() -> dict[str, Any]:
            now = self._ask(credentials.get_frozen_credentials())  # botocore renews them
            return {
                "access_key_id": now.access_key,
                "secret_access_key": now.secret_key,
                "token": now.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_HOLD,
            }

        options: ClientConfig = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "read_timeout": timedelta(seconds=limits.read_s),
            "timeout": timedelta(seconds=Deadline(bucket).try_s(_LARGEST_BYTES)),
        }
        endpoint, bundle = client.meta.endpoint_url, os.environ.get("AWS_CA_BUNDLE")
        if bundle and endpoint.startswith("https:"):
            options["root_certificate"] = Path(bundle).read_bytes()
        signing: dict[str, Any] = {"skip_signature": True}
        if credentials is not None and not self.fs.anon:
            signing = {"credential_provider": current}
        return S3Store(
            bucket,
            endpoint=endpoint,
            region=client.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            client_options=options,
            retry_config={"max_retries": 0},
            **signing,
        )

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        patience = Deadline("the credentials of S3")
        return result_of(asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop), patience)
