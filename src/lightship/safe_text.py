"""Text from outside (names of files and classes, answers of servers) where a person reads it."""

import re

from lightship.redaction import redact

_NOT_TEXT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)
"""Controls of terminals, line breaks, marks that reorder a line, and halves of characters."""
_CELL_IS_FORMULA = re.compile(r"'*[=+\-@\t\r\n\0\uff1d\uff0b\uff0d\uff20]")


def printable(text: str) -> str:
    r"""`text` in one line that is what it seems: `\x1b`, `\n`, `\u202e`, and bytes as `\xff`."""
    return text if text.isascii() and text.isprintable() else _NOT_TEXT.sub(_escape, text)


def shown(text: str) -> str:
    """`text` for a log line: without secrets, and printable."""
    return printable(redact(text))


def csv_cell(text: str) -> str:
    """`text` for a CSV file: a spreadsheet would calculate what begins with =, +, - or @.

    An apostrophe before it makes it text; one is also put before an apostrophe that precedes such a
    sign, so that a reader who takes one off there has the text again.
    """
    return f"'{text}" if _CELL_IS_FORMULA.match(text) else text


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()
