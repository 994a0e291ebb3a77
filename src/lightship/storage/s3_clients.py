"""Clients of S3: what s3.py needs of one, and s3fs."""
# ruff: noqa: D102 (see S3Client)

import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Protocol

from lightship.storage.backend import Data
from lightship.storage.errors import BadCredentials, reason
from lightship.storage.fsspec_backend import cat_file
from lightship.storage.repeats import Repeats
from lightship.storage.retry import Deadline, with_retries

Page = dict[str, int]
"""Key -> bytes of objects."""


class S3Client(Protocol):
    """Reads and lists, each request once; all calls block."""

    def connect(self, path: str) -> None:
        """Open the connections to the bucket of "BUCKET/KEY"."""

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        """Bytes [start, end) of "BUCKET/KEY"; fewer if the object is shorter."""

    def pages(
        self, deadline: Deadline, bucket: str, prefix: str, max_keys: int | None = None
    ) -> Iterator[Page]:
        """The objects below a prefix, 1,000 (or `max_keys`) a page.

        Args:
            deadline: Of the listing; each page is progress.
            bucket: Its name.
            prefix: Empty, or with a slash at its end.
            max_keys: Of a page.
        """


class S3fs:
    """The client that can do everything.

    Args:
        fs: The file system of s3fs.
    """

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        fs.set_session = partial(_with_credentials, fs, fs.set_session)

    def connect(self, path: str) -> None:
        self.fs.exists(path)

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        # Without the limit it asks for the size first: a HEAD for each object.
        return cat_file(self.fs, deadline, path, start, end, max_concurrency=1)

    def pages(
        self, deadline: Deadline, bucket: str, prefix: str, max_keys: int | None = None
    ) -> Iterator[Page]:
        where = {"MaxKeys": min(max_keys, 1000)} if max_keys else {}
        for answer in self.answers(deadline, Bucket=bucket, Prefix=prefix, **where):
            yield objects(answer)

    def answers(self, deadline: Deadline, **where: Any) -> Iterator[dict[str, Any]]:
        """The answers of a listing, page by page."""
        repeats = Repeats()

        def check(answer: dict[str, Any]) -> None:
            token = answer.get("NextContinuationToken")
            if answer.get("IsTruncated") and (not token or repeats.has(token)):
                raise OSError(f"the listing goes on with {'a used' if token else 'no'} token")

        while True:
            answer = self.call(deadline, 0, "list_objects_v2", check=check, **where)
            yield answer
            if not answer.get("IsTruncated"):
                return
            where["ContinuationToken"] = answer["NextContinuationToken"]

    def call(
        self,
        deadline: Deadline,
        size_bytes: int,
        method: str,
        check: Callable[[dict[str, Any]], None] = lambda answer: None,
        **args: Any,
    ) -> dict[str, Any]:
        """One request with retries of its own, so that a fault does not undo those before it.

        Args:
            deadline: Of the call that it is a part of; an answer is progress.
            size_bytes: Of what is sent.
            method: Name of the operation.
            check: Raises OSError for an answer that should be asked for again.
            args: Of the operation.
        """
        request = partial(self.fs.call_s3, method, timeout=deadline.try_s(size_bytes), **args)

        def ask() -> dict[str, Any]:
            answer = request()
            check(answer)
            return answer

        inner = Deadline(deadline.url, size_bytes, is_first=deadline.is_first)
        answer = with_retries(ask, inner)
        deadline.progress()
        return answer


async def _with_credentials(
    fs: Any, set_session: Callable[..., Awaitable[Any]], refresh: bool = False, **how: Any
) -> Any:
    """s3fs's `set_session`; a client that has found no credentials is made again.

    It would be without them for good. The signer's names are botocore's private ones: without them
    the client is kept.
    """
    signer = getattr(fs._s3, "_request_signer", None)
    if not fs.anon and getattr(signer, "_credentials", fs) is None:
        refresh = True
    try:
        return await set_session(refresh=refresh, **how)
    except json.JSONDecodeError as error:
        raise BadCredentials(
            f"S3: the credential_process of ~/.aws/config does not print JSON ({reason(error)})"
        ) from error


def objects(answer: dict[str, Any]) -> Page:
    """The objects of an answer, without the empty ones by which consoles mark folders."""
    contents = answer.get("Contents", ())
    return {entry["Key"]: entry["Size"] for entry in contents if not entry["Key"].endswith("/")}
