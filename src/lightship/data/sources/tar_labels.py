"""The label of a sample in a WebDataset shard: KEY.cls, or a key of KEY.json."""

import json

from lightship.data.names import check_label_length
from lightship.data.sources.file_names import suffix
from lightship.data.sources.parts import Label
from lightship.errors import DataError

MAX_LABEL_BYTES = 2**22
"""Of one .cls or .json."""
_MAX_DIGITS = 20  # of a number that an int64 may hold, with its sign


def is_label(path: str) -> bool:
    """Whether the extension is that of a sample's label."""
    return suffix(path) in ("cls", "json")


def parse_label(path: str, raw: bytes, where: str) -> Label:
    """The label in a file, a number where it is one; None: a .json without a label.

    Args:
        path: Of the file, which `is_label`.
        raw: Its content.
        where: What to call it in messages.

    Raises:
        DataError: It holds something else.
    """
    label = _json_label(raw, where) if suffix(path) == "json" else _text_label(raw, where)
    if label is None:
        return None
    if (digits := str(label)).removeprefix("-").isdecimal():
        if len(digits) > _MAX_DIGITS:
            raise DataError(f"{where}: the label {digits[:_MAX_DIGITS]}... is no class number")
        return int(label)
    check_label_length(str(label), where)
    return label


def _text_label(raw: bytes, where: str) -> str:
    try:
        label = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}") from error
    if len(label.splitlines()) != 1:
        raise DataError(f"{where} holds {len(label.splitlines())} lines; a label is one")
    return label


def _json_label(raw: bytes, where: str) -> Label:
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    label = table.get("label", table.get("cls")) if isinstance(table, dict) else None
    if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
        kind = type(label).__name__
        raise DataError(f"{where}: the label is of type {kind}: neither a number nor text")
    return label
