"""Byte ranges of S3 objects through obstore, where that is installed: much less CPU than s3fs.

A GET by obstore (Rust, off Python's lock) costs a sixth of the CPU that one by s3fs costs. It is
only the first try: what goes wrong in it is tried again by s3fs, whose errors retry.py understands.
Its endpoint, region and credentials are those that s3fs has found, so there is one place to set
them; where s3fs is set up in a way that this cannot follow, s3fs reads alone.
"""

import asyncio
import importlib.util
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.exits import ConfigError
from lightship.storage.retry import Limits, Patience

if TYPE_CHECKING:
    from obstore.store import ClientConfig

_CREDENTIALS_HOLD = timedelta(minutes=1)
_ENOUGH_DOUBT = 8
_owner: int | None = None
"""The process whose threads obstore runs on: a child after fork has none of them."""


class FirstTryFailed(OSError):
    """Worth another try, by s3fs."""


class S3Ranges:
    """Ranges read from the buckets that one s3fs file system reaches.

    Args:
        fs: The file system. All calls must come from its event loop.
    """

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._stores: dict[str, Any] = {}
        self._succeeded, self._doubt = False, 0

    @classmethod
    def where_possible(cls, fs: Any) -> "S3Ranges | None":
        """None where obstore is not installed, not wanted, or would not do what s3fs does.

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

    async def read(self, patience: Patience, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of "BUCKET/KEY"; fewer if the object is shorter.

        Raises:
            FirstTryFailed: Whatever went wrong.
        """
        import obstore

        bucket, key, _ = self.fs.split_path(path)
        try:
            async with asyncio.timeout(patience.try_s(end - start)):
                if bucket not in self._stores:
                    self._stores[bucket] = await self._store(bucket)
                got = await obstore.get_range_async(self._stores[bucket], key, start=start, end=end)
        except Exception as error:
            raise FirstTryFailed(f"{type(error).__name__}: {error}") from error
        self._succeeded = True
        return bytes(got)

    def is_trusted(self) -> bool:
        """Whether it has read something, or has not yet failed often where s3fs then did not."""
        return self._succeeded or self._doubt < _ENOUGH_DOUBT

    def s3fs_could(self) -> None:
        """Take note that s3fs read what this could not."""
        self._doubt += 1

    async def _store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        client, limits = await self.fs.set_session(), Limits.now()
        credentials = client._get_credentials()

        async def current() -> dict[str, Any]:
            now = await credentials.get_frozen_credentials()  # renewed by botocore when need be
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
            "timeout": timedelta(days=1),  # `read` bounds it by the size
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
