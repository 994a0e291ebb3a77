"""The headers of a tar (POSIX.1-2001 pax, ustar, GNU, v7), read within bounds.

`tarfile` trusts them: a negative size makes it read the same header for ever (CVE-2025-8194), and
a long name or a PAX block of GiB is read into memory.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from lightship.errors import DataError
from lightship.storage.bounds import MAX_FILE_BYTES, MAX_NAME_BYTES, MAX_TAR_METADATA_BYTES

BLOCK_BYTES = 512
Kind = Literal["file", "folder", "hard link", "link", "sparse", "special"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "hard link", b"2": "link",
    b"S": "sparse", b"3": "special", b"4": "special", b"6": "special", b"D": "special",
    b"M": "special", b"V": "special",
}  # fmt: skip
"""Others are files too, as POSIX says of unknown types."""
_WITHOUT_CONTENT = b"123456"
_LONG_NAME, _LONG_TARGET, _PAX, _GLOBAL_PAX = b"L", b"K", (b"x", b"X"), b"g"
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_GLOBAL_MEANINGLESS = {"path", "linkpath", "size"}


class Member(NamedTuple):
    """One member of a tar."""

    path: str
    """As it stands there, without slashes at the end; bytes that are not UTF-8 as surrogates."""
    kind: Kind
    header: int
    """Offset of its first header."""
    start: int
    """Offset of its content."""
    size: int
    target: str
    """What a link leads to, as it stands there."""


class _Header(NamedTuple):
    """One block."""

    name: bytes
    size: int
    type: bytes
    target: bytes
    is_extended: bool
    """Whether a block of a GNU sparse file's map follows."""


def read_headers(stream: Any) -> Iterator[Member]:
    """The members, up to the block of zeros that ends them; then `stream` is just after it.

    Between two members, the stream may be read anywhere.

    Args:
        stream: A seekable binary file.

    Raises:
        DataError: There is something else than a header, or one out of bounds.
    """
    at = 0
    while True:
        header_at, long_name, long_target = at, b"", b""
        records: dict[str, bytes] = {}
        while True:
            stream.seek(at)
            if (header := _parse(stream.read(BLOCK_BYTES), at)) is None:
                return
            at += BLOCK_BYTES
            if header.type == _LONG_NAME:
                long_name = _metadata(stream, header, at).partition(b"\0")[0]
            elif header.type == _LONG_TARGET:
                long_target = _metadata(stream, header, at).partition(b"\0")[0]
            elif header.type in _PAX:
                records |= _pax_records(_metadata(stream, header, at))
            elif header.type == _GLOBAL_PAX:
                _check_global(_pax_records(_metadata(stream, header, at)), at)
            else:
                break
            at += _blocks(header.size)
        while header.is_extended:
            block = stream.read(BLOCK_BYTES)
            at += BLOCK_BYTES
            header = header._replace(is_extended=block[504:505] > b"\0")
        name = records.get("path", long_name or header.name)
        target = records.get("linkpath", long_target or header.target)
        size = _pax_size(records["size"], at) if "size" in records else header.size
        kind = _KINDS.get(header.type, "file")
        if any(key.startswith("GNU.sparse.") for key in records):
            name, kind = records.get("GNU.sparse.name", name), "sparse"
        if kind == "file" and name.endswith(b"/") and header.type == b"\0":
            kind = "folder"  # as v7 marks them
        name = name.rstrip(b"/") if kind == "folder" else name
        size = 0 if header.type in _WITHOUT_CONTENT or kind == "folder" else size
        yield Member(_text(name, header_at), kind, header_at, at, size, _text(target, header_at))
        at += _blocks(size)


def _parse(block: bytes, at: int) -> _Header | None:
    """The header in a block; None for the block of zeros."""
    if len(block) < BLOCK_BYTES:
        raise DataError(
            f"it stops at byte {at} without the two blocks of zeros that end one: cut, or its "
            "writer was not closed; download or write it again, or if nothing is missing, append "
            "1024 zero bytes"
        )
    if not block[0] and not any(block):
        return None
    total = 256 + sum(block) - sum(block[148:156])
    if (stored := _number(block[148:156])) != total:
        signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stored != signed:
            raise DataError(f"no header at byte {at} but something else")
    size = _number(block[124:136])
    if size is None or not 0 <= size <= MAX_FILE_BYTES:
        raise DataError(f"the header at byte {at} has the size {size}; it must be 0 to 2^48")
    name, kind = block[:100].partition(b"\0")[0], block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    is_extended = kind == b"S" and block[482] > 0
    return _Header(name, size, kind, block[157:257].partition(b"\0")[0], is_extended)


def is_header(block: bytes) -> bool:
    """Whether a block is a header."""
    try:
        return _parse(block, 0) is not None
    except DataError:
        return False


def _number(field: bytes) -> int | None:
    """A field's number, octal or (GNU) base 256; None: it is none."""
    if field[0] in (0o200, 0o377):
        number = int.from_bytes(field[1:], "big")
        return number if field[0] == 0o200 else number - 256 ** (len(field) - 1)
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _metadata(stream: Any, header: _Header, at: int) -> bytes:
    if header.size > MAX_TAR_METADATA_BYTES:
        raise DataError(
            f"the metadata at byte {at} have {header.size} bytes; at most {MAX_TAR_METADATA_BYTES} "
            "(a long name, PAX records) are read: write it again without extended attributes"
        )
    return stream.read(header.size)


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Keyword -> value of the records `LENGTH KEYWORD=VALUE\\n`."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        found = _RECORD.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise DataError("a damaged PAX record")
        records[found[2].decode("utf-8", "replace")] = data[found.end() : end - 1]
        at = end
    return records


def _check_global(records: dict[str, bytes], at: int) -> None:
    """Global records that name one member's path or size are not honest."""
    for key in records:
        if key in _GLOBAL_MEANINGLESS or key.startswith("GNU.sparse."):
            raise DataError(f"the PAX block at byte {at} sets {key} of all members")


def _pax_size(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 19 or int(value) >= MAX_FILE_BYTES:
        shown = value[:30].decode("ascii", "backslashreplace")
        raise DataError(f"the PAX size before byte {at} is {shown}; it must be 0 to 2^48")
    return int(value)


def _text(name: bytes, at: int) -> str:
    if len(name) > MAX_NAME_BYTES:
        raise DataError(
            f"the name at byte {at} has {len(name)} bytes; at most {MAX_NAME_BYTES} are read: "
            "rename it"
        )
    return name.decode("utf-8", "surrogateescape")


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
