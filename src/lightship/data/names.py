"""Names of classes and files: one Unicode form; refused where a later step would fail on them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from lightship.errors import DataError

MAX_NAME_CHARACTERS = 1024
"""Of a class."""
_MANY_CLASSES, _MAX_CLASSES_PER_SAMPLE = 100_000, 10
_AT_ONCE = 2**14
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def normal_form(name: str) -> str:
    """A class name in composed form (NFC): macOS and some archivers write é as two characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def check_label_length(label: str, where: str) -> None:
    """Raise DataError for text that is too long to be a class name."""
    if len(label) > MAX_NAME_CHARACTERS:
        raise DataError(
            f"{where}: the class name {printable(label[:40])}... has {len(label)} characters; at "
            f"most {MAX_NAME_CHARACTERS}"
        )


def check_class_count(names: Sequence[Any], samples: int, where: str) -> None:
    """Raise DataError for far more classes than there are samples: each takes a row of the net."""
    bound = max(_MANY_CLASSES, _MAX_CLASSES_PER_SAMPLE * samples)
    if len(names) > bound:
        raise DataError(
            f"{where}: {len(names)} class names for {samples} samples; at most {bound} "
            f"({_MANY_CLASSES}, or {_MAX_CLASSES_PER_SAMPLE} a sample): shorten the list of classes"
        )


def check_class_names(names: Sequence[Any], root: str) -> list[str]:
    """The class names as text in composed form, in the same order.

    Args:
        names: One a class; integers, which metadata may hold, become text.
        root: What to call the root in messages.

    Raises:
        DataError: A name is neither text nor an integer, is empty, holds control characters or a
            lone surrogate, or stands there twice.
    """
    checked = []
    for i, name in enumerate(names):
        if not isinstance(name, str) and type(name) is not int:
            is_short = name is None or isinstance(name, bool | float)  # a list may have no end
            shown = repr(name) if is_short else f"a {type(name).__name__}"
            raise DataError(f"{root}: the name of class {i} is {shown}; it must be text")
        text = str(name)
        check_label_length(text, root)
        text = normal_form(text)
        if not text.strip():
            raise DataError(f"{root}: the name of class {i} is empty ({name!r}); name it")
        if not _is_unicode(text):
            raise DataError(f"{root}: the class name {printable(text)} is not UTF-8; rename it")
        if _CONTROL.search(text):
            raise DataError(f"{root}: the class name {text!r} has control characters; rename it")
        checked.append(text)
    if twice := [name for name, count in Counter(checked).items() if count > 1]:
        where = [i for i, name in enumerate(checked) if name == twice[0]]
        raise DataError(
            f"{root}: the classes {where[0]} and {where[1]} are both named {twice[0]!r}; each "
            "class needs a name of its own"
        )
    return checked


def check_file_names(paths: Iterable[str], root: str) -> None:
    """Raise DataError for paths that are not UTF-8, which no table of samples could hold."""
    wrong, first, rest = 0, "", iter(paths)
    while some := list(islice(rest, _AT_ONCE)):
        if not _is_unicode("\n".join(some)):
            bad = [path for path in some if not _is_unicode(path)]
            wrong, first = wrong + len(bad), first or bad[0]
    if wrong:
        raise DataError(
            f"{root}: {wrong} file {'name is' if wrong == 1 else 'names are'} not valid "
            f"UTF-8, such as {printable(first)}; rename the file or its folder"
        )


def printable(text: str) -> str:
    r"""`text` with the bytes that are not UTF-8 as \xNN."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
