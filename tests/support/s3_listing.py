"""Listings of S3 without a server: the answers are computed where s3fs would parse a server's."""

from collections.abc import Callable, Iterator
from typing import Any

from lightship.storage.s3_clients import S3fs

URL, CLASSES = "s3://bucket/set", 1000
"""Class folders; a name below the root has 33 bytes."""
_TOP, _PAGE = "set/train/", 1000


def answers(objects: int) -> Callable[..., Iterator[dict[str, Any]]]:
    """`S3fs.answers` for the bucket with so many objects."""
    per_class = -(-objects // CLASSES)

    def answer(self: S3fs, deadline: Any, **where: Any) -> Iterator[dict[str, Any]]:
        prefix = where["Prefix"]
        if "Delimiter" in where:
            inner = [_TOP] if prefix == "set/" else map(_folder, range(CLASSES))
            yield {"CommonPrefixes": [{"Prefix": each} for each in inner]}
            return
        one = int(prefix[-9:-1]) if len(prefix) > len(_TOP) else None
        first, end = (0, objects) if one is None else (one * per_class, (one + 1) * per_class)
        for start in range(first, min(end, objects), _PAGE):
            page = range(start, min(start + _PAGE, end, objects))
            keys = (f"{_folder(i // per_class)}{i:012d}.JPEG" for i in page)
            sizes = (20_000 + i % 9973 for i in page)
            yield {
                "Contents": [
                    {"Key": key, "Size": size} for key, size in zip(keys, sizes, strict=True)
                ]
            }
            deadline.progress()

    return answer


def _folder(number: int) -> str:
    return f"{_TOP}n{number:08d}/"
