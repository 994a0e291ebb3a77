"""Text from outside is one line, and what it seems."""

import json
import unicodedata

import pytest

from lightship.safe_text import csv_cell, printable


def test_no_control_bidi_or_surrogate_is_left_of_any_character() -> None:
    for number in [*range(0x3000), *range(0xD800, 0xE000), *range(0xFE00, 0x10000)]:
        shown = printable(chr(number))
        shown.encode()
        assert len(shown.splitlines()) <= 1
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        assert not [c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE",
                    "PDF", "RLI", "LRI", "FSI", "PDI")]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb\n[   0:05] done", "a\\x1b[31mb\\n[   0:05] done"),
        ("caf\udce9.png", "caf\\xe9.png"),
        ("a\u202egnp.exe\u2028b\u2066", "a\\u202egnp.exe\\u2028b\\u2066"),
        ("漢字 🐈 é نص a\u200db", "漢字 🐈 é نص a\u200db"),
        ("plain text, 'quoted'", "plain text, 'quoted'"),
    ],
)
def test_what_is_shown(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert json.loads(json.dumps(printable(text))) == expected


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "'=1", "''-1"])
def test_formulas_get_one_apostrophe(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "'", "'tis", "''", "1-2", " =1"])
def test_other_cells_stay(text: str) -> None:
    assert csv_cell(text) == text
