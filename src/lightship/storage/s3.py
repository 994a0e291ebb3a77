"""S3: listings by several hands, byte ranges by obstore first, uploads in parts.

Each page of a listing and each part of an upload is tried again on its own.
"""
# ruff: noqa: D102

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from lightship.storage.backends import PIECE_BYTES, Async, Data, FileInfo, Source, length_of, piece
from lightship.storage.obstore_s3 import FirstTryFailed, ObstoreS3
from lightship.storage.retry import Deadline, Limits, at_once, persist

_PAGES_ALONE = 8
_FOLDERS_AT_ONCE = 16
_FOLDER_LEVELS = 3
_LEAST_IN_A_FOLDER = 100
_PARTS_AT_ONCE = 4
Page = dict[str, int]
"""Key -> bytes of objects."""


class S3(Async):
    """The buckets that one s3fs file system reaches."""

    def __init__(self, fs: Any):
        super().__init__(fs)
        self.obstore = ObstoreS3.where_possible(fs)

    def reads_at_once(self, limits: Limits) -> int:
        return (2 if self.obstore else 1) * limits.in_flight  # one costs it next to nothing

    def connect(self, patience: Deadline, path: str) -> None:
        super().connect(patience, path)
        if self.obstore:
            self.obstore.connect(path)

    def files(
        self,
        patience: Deadline,
        path: str,
        most: int | None = None,
        skip: Callable[[str], bool] | None = None,
    ) -> list[FileInfo]:
        bucket, key, _ = self.fs.split_path(path)
        prefix = key.rstrip("/") + "/" if key else ""
        found: Page = {}
        for number, page in enumerate(self._pages(patience, bucket, prefix, most), 1):
            found |= page
            if most and len(found) >= most:
                break
            if number == _PAGES_ALONE and _are_gathered(found):
                found |= self._by_folders(patience, bucket, prefix)
                break
        listed = [FileInfo(name[len(prefix) :], size) for name, size in found.items()]
        if not listed and key and (size := self.size(patience, path)) is not None:
            listed.append(FileInfo("", size))
        return listed

    def _by_folders(self, patience: Deadline, bucket: str, prefix: str) -> Page:
        """All objects below a prefix, many folders at once.

        Each page alone tells how to ask for the next; the folders can be asked for at any time.
        """
        found: Page = {}
        folders = [prefix]
        for _ in range(_FOLDER_LEVELS):
            inner: list[str] = []
            look = partial(self._folder, patience, bucket)
            for names, page in at_once(look, folders, _FOLDERS_AT_ONCE, patience):
                inner += names
                found |= page
            folders = inner
            if len(folders) >= _FOLDERS_AT_ONCE:
                break

        def below(folder: str) -> Page:
            pages = self._pages(patience, bucket, folder)
            return {name: size for page in pages for name, size in page.items()}

        for page in at_once(below, folders, _FOLDERS_AT_ONCE, patience):
            found |= page
        return found

    def _folder(self, patience: Deadline, bucket: str, folder: str) -> tuple[list[str], Page]:
        """(the folders, as "PREFIX/", the objects) that lie in a folder itself."""
        inner: list[str] = []
        found: Page = {}
        for answer in self._answers(patience, Bucket=bucket, Prefix=folder, Delimiter="/"):
            inner += [each["Prefix"] for each in answer.get("CommonPrefixes", ())]
            found |= _objects(answer)
        return inner, found

    def _pages(
        self, patience: Deadline, bucket: str, prefix: str, most: int | None = None
    ) -> Iterator[Page]:
        """The objects below a prefix; some twice if obstore gives up on the way.

        What it finds nothing in is asked for again by s3fs, whose errors say why.
        """
        if self.obstore and not most and not patience.tries and self.obstore.may_try():
            with contextlib.suppress(FirstTryFailed):
                is_any = False
                for page in self.obstore.pages(bucket, prefix):
                    patience.progress()
                    is_any = True
                    yield page
                if is_any:
                    return
        where = {"MaxKeys": min(most, 1000)} if most else {}
        for answer in self._answers(patience, Bucket=bucket, Prefix=prefix, **where):
            yield _objects(answer)

    def _answers(self, patience: Deadline, **where: Any) -> Iterator[dict[str, Any]]:
        while True:
            answer = self.call(patience, 0, "list_objects_v2", **where)
            yield answer
            if not answer.get("IsTruncated"):
                return
            where["ContinuationToken"] = answer["NextContinuationToken"]

    def get(self, patience: Deadline, path: str, start: int, end: int | None, **how: Any) -> Data:
        obstore = self.obstore if end is not None else None
        if obstore and end is not None and not patience.tries and obstore.may_try(end - start):
            return obstore.read(path, start, end)
        # Without the limit it would ask for the size first: a HEAD for each object.
        data = super().get(patience, path, start, end, max_concurrency=1)
        if obstore and patience.tries:
            obstore.s3fs_could()
        return data

    def put(self, patience: Deadline, path: str, source: Source) -> None:
        bucket, key, _ = self.fs.split_path(path)
        size = length_of(source)
        part_bytes = max(2 * PIECE_BYTES, -(-size // 10_000))  # S3 takes 10,000 parts
        if size <= 2 * part_bytes:
            body = piece(source, 0, size)
            # The client bounds the silence of a server that answers, not of one that takes no more.
            limit_s = patience.try_s(size)
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=body, timeout=limit_s)
            return
        call = partial(self.call, patience, part_bytes, Bucket=bucket, Key=key)
        call = partial(call, UploadId=call("create_multipart_upload")["UploadId"])

        def put_part(i: int) -> dict[str, Any]:
            body = piece(source, i * part_bytes, part_bytes)
            tag = call("upload_part", PartNumber=i + 1, Body=body)["ETag"]
            return {"PartNumber": i + 1, "ETag": tag}

        try:
            todo = range(-(-size // part_bytes))
            parts = at_once(put_part, todo, _PARTS_AT_ONCE, patience)
            call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except BaseException:
            call("abort_multipart_upload")
            raise

    def call(self, patience: Deadline, size: int, method: str, **args: Any) -> dict[str, Any]:
        """One request with tries of its own, so that a fault does not undo those before."""
        limit_s = patience.try_s(size)
        request = partial(self.fs.call_s3, method, timeout=limit_s, **args)
        answer = persist(request, Deadline(patience.url, size))
        patience.progress()
        return answer


def _objects(answer: dict[str, Any]) -> Page:
    return {
        entry["Key"]: entry["Size"]
        for entry in answer.get("Contents", ())
        if not entry["Key"].endswith("/")  # what consoles put where a folder shall show
    }


def _are_gathered(keys: Collection[str]) -> bool:
    """Whether there are folders, with so many objects each that their own pages are fairly full."""
    folders = {key.rpartition("/")[0] for key in keys}
    return 1 < len(folders) <= len(keys) / _LEAST_IN_A_FOLDER
