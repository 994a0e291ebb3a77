"""S3: parallel listings, byte ranges by obstore first, uploads in parts.

Each page of a listing and each part of an upload has retries of its own.
"""
# ruff: noqa: D102 (see backend.Backend)

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

from lightship.errors import LightshipError
from lightship.storage.backend import (
    PIECE_BYTES,
    Data,
    Selection,
    Source,
    length_of,
    piece,
)
from lightship.storage.errors import NotFound
from lightship.storage.file_table import FileTable, FileTableBuilder
from lightship.storage.fsspec_backend import Async
from lightship.storage.obstore_s3 import Access, FirstTryFailed, ObstoreS3
from lightship.storage.parallel import parallel_map
from lightship.storage.retry import Deadline, Limits
from lightship.storage.s3_clients import Page, S3Client, S3fs, objects

_PAGES_ALONE = 8
_MAX_FOLDERS_AT_ONCE = 16
_MAX_FOLDER_LEVELS = 3
_MIN_IN_A_FOLDER = 100
_MAX_PARTS_AT_ONCE = 4
_MARK = "lightship-upload"
"""Metadata of an object that tells which upload made it."""


class S3(Async):
    """The buckets that one file system of s3fs reaches.

    Args:
        build: Makes the file system.
        access: Of another process; s3fs, whose import takes longer than all others of a data
            worker, is then imported only if something fails.
    """

    def __init__(self, build: Callable[[], Any], access: Access | None = None) -> None:
        self._build, self._access, self.is_read_only = build, access, False
        if access is not None:
            self.obstore: ObstoreS3 | None = ObstoreS3(lambda: self.fs, access)
        else:
            self.obstore = ObstoreS3.where_possible(self.fs)
        if self.obstore:
            self.max_reads = 2 * Limits.in_flight  # one costs it next to nothing

    @cached_property
    def s3fs(self) -> S3fs:
        """The client that can do everything."""
        return S3fs(self._build())

    @cached_property
    def fs(self) -> Any:
        """Its file system."""
        return self.s3fs.fs

    def access(self) -> Access | None:
        """How another process may reach the same buckets; None: it has to find out. Blocks."""
        return self.obstore.access() if self.obstore else None

    def _client(self, deadline: Deadline, size_bytes: int = 0) -> S3Client:
        """obstore for the first try; s3fs for the others, because errors.py knows its errors."""
        if self.obstore and not deadline.tries and self.obstore.may_try(size_bytes):
            return self.obstore
        return self.s3fs

    def connect(self, deadline: Deadline, path: str) -> None:
        if self._access is None:
            self.s3fs.connect(path)
        if self.obstore:
            self.obstore.connect(path)

    def files(self, deadline: Deadline, path: str, selection: Selection) -> FileTable:
        max_files = selection.max_files
        bucket, key, _ = self.fs.split_path(path)
        prefix = key.rstrip("/") + "/" if key else ""
        found, folders = FileTableBuilder(f"s3://{path}"), set[str]()
        for number, page in enumerate(self._pages(deadline, bucket, prefix, max_files), 1):
            _add(found, page, prefix)
            if max_files and len(found) >= max_files:
                break
            if number <= _PAGES_ALONE:
                folders |= {key.rpartition("/")[0] for key in page}
            # Several folders whose own pages would be fairly full.
            is_gathered = 1 < len(folders) <= len(found) / _MIN_IN_A_FOLDER
            if number == _PAGES_ALONE and is_gathered:
                self._by_folders(deadline, bucket, prefix, found)
                break
        if not len(found) and key and (size := self.size(deadline, path)) is not None:
            return FileTable.of({"": size})
        return found.finish()

    def _by_folders(
        self, deadline: Deadline, bucket: str, prefix: str, to: FileTableBuilder
    ) -> None:
        """Add all objects below a prefix, by listing many folders at once.

        The pages of one listing come one after the other; those of several folders need not.
        """
        folders, turn = [prefix], threading.Lock()

        def add(page: Page) -> None:
            with turn:
                _add(to, page, prefix)

        for _ in range(_MAX_FOLDER_LEVELS):
            look = partial(self._folder, deadline, bucket, add)
            inner = parallel_map(look, folders, _MAX_FOLDERS_AT_ONCE, deadline)
            folders = [name for names in inner for name in names]
            if len(folders) >= _MAX_FOLDERS_AT_ONCE:
                break

        def below(folder: str) -> None:
            for page in self._pages(deadline, bucket, folder):
                add(page)

        parallel_map(below, folders, _MAX_FOLDERS_AT_ONCE, deadline)

    def _folder(
        self, deadline: Deadline, bucket: str, add: Callable[[Page], None], folder: str
    ) -> list[str]:
        """The folders, as "PREFIX/", directly in a folder, whose own objects are added."""
        inner: list[str] = []
        for answer in self.s3fs.answers(deadline, Bucket=bucket, Prefix=folder, Delimiter="/"):
            inner += [each["Prefix"] for each in answer.get("CommonPrefixes", ())]
            add(objects(answer))
        return inner

    def _pages(
        self, deadline: Deadline, bucket: str, prefix: str, max_keys: int | None = None
    ) -> Iterator[Page]:
        """The objects below a prefix; some twice if obstore fails on the way."""
        client = self.s3fs if max_keys else self._client(deadline)
        with contextlib.suppress(FirstTryFailed):
            yield from client.pages(deadline, bucket, prefix, max_keys)
            return
        yield from self.s3fs.pages(deadline, bucket, prefix, max_keys)

    def get(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        client = self.s3fs if end is None else self._client(deadline, end - start)
        data = client.read(deadline, path, start, end)
        if self.obstore and deadline.tries and end is not None:
            self.obstore.s3fs_could()
        return data

    def put(self, deadline: Deadline, path: str, source: Source) -> None:
        bucket, key, _ = self.fs.split_path(path)
        size = length_of(source)
        part_bytes = max(2 * PIECE_BYTES, -(-size // 10_000))  # S3 takes 10,000 parts
        if size <= 2 * part_bytes:
            body = piece(source, 0, size)
            # The client bounds the silence of a server that answers, not of one that reads no more.
            limit_s = deadline.try_s(size)
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=body, timeout=limit_s)
            return
        call = partial(self.s3fs.call, deadline, part_bytes, Bucket=bucket, Key=key)
        mark = {_MARK: uuid.uuid4().hex}
        call = partial(call, UploadId=call("create_multipart_upload", Metadata=mark)["UploadId"])

        def put_part(i: int) -> dict[str, Any]:
            body = piece(source, i * part_bytes, part_bytes)
            tag = call("upload_part", PartNumber=i + 1, Body=body)["ETag"]
            return {"PartNumber": i + 1, "ETag": tag}

        try:
            todo = range(-(-size // part_bytes))
            parts = parallel_map(put_part, todo, _MAX_PARTS_AT_ONCE, deadline)
            try:
                call("complete_multipart_upload", MultipartUpload={"Parts": parts})
            except NotFound:
                # Complete already, if the answer to an earlier try was lost?
                if not self._has_mark(deadline, mark, Bucket=bucket, Key=key):
                    raise
        except BaseException:
            with contextlib.suppress(LightshipError):  # the first error is the one to know
                call("abort_multipart_upload")
            raise

    def _has_mark(self, deadline: Deadline, mark: dict[str, str], **place: Any) -> bool:
        """Whether an object is the one that was uploaded with this mark."""
        with contextlib.suppress(NotFound):
            found = self.s3fs.call(deadline, 0, "head_object", **place)
            return mark.items() <= found.get("Metadata", {}).items()
        return False


def _add(to: FileTableBuilder, page: Page, prefix: str) -> None:
    """Add objects by their paths below a prefix."""
    for key, size_bytes in page.items():
        to.add(key[len(prefix) :], size_bytes)
