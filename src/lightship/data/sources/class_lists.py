"""Lists of class names beside shards: classes.txt, one a line, or classes.json."""

import codecs
import json
from collections.abc import Container

from lightship import storage
from lightship.data.names import check_class_names
from lightship.data.sources.file_names import suffix
from lightship.errors import DataError

_MAX_BYTES = 2**24
CLASS_LISTS = ("classes.txt", "classes.json")


def read_class_list(url: str, paths: Container[str], shard: str, root: str) -> list[str] | None:
    """The classes named by a file beside the shards or at the root: one a line, or a JSON list."""
    for folder in (shard.rpartition("/")[0], ""):
        for file in CLASS_LISTS:
            path = f"{folder}/{file}".lstrip("/")
            if path not in paths:
                continue
            try:
                raw = storage.read_small(storage.join(url, path), _MAX_BYTES)
            except storage.TooLarge as error:
                raise DataError(f"{error}; it is to be a list of class names") from error
            return _parse_classes(raw, path, root)
    return None


def _parse_classes(raw: bytes, path: str, root: str) -> list[str]:
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{root}: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    if suffix(path) == "json":
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{root}: {path} is not JSON: {error}") from error
        if not isinstance(names, list):
            raise DataError(f"{root}: {path} is not a list of class names")
        return check_class_names(names, f"{root}: {path}")
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names[:-1] or names == [""]:
        raise DataError(
            f"{root}: line {names.index('') + 1} of {path} is empty; each line names the class of "
            "one number, from 0, so remove the line or name the class"
        )
    return check_class_names(names, f"{root}: {path}")
