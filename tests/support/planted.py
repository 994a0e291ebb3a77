"""Looks for planted secrets in files, archives within files, and running processes."""

import base64
import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MARK = b"S3CR3T"
"""A part of every planted secret that no encoding of a URL or of JSON changes."""


def finds(content: bytes, forms: tuple[str, ...] = ()) -> list[bytes]:
    """Where the mark, or one of `forms`, stands in `content` or in an archive within it."""
    marks = [MARK, *(form.encode() for form in forms)]
    return [
        each[max(0, found.start() - 60) : found.end() + 20]
        for each in unpacked(content)
        for found in re.finditer(b"(?i)" + b"|".join(map(re.escape, marks)), each)
    ]


def unpacked(content: bytes) -> Iterator[bytes]:
    """`content`, and what is in it if it is a zip (npz, ckpt, pt2), gzip, zlib stream or tar."""
    yield content
    if content[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from unpacked(archive.read(name))
    elif content[:2] == b"\x1f\x8b":
        yield from unpacked(gzip.decompress(content))
    elif content[:1] == b"\x78":
        try:
            yield zlib.decompress(content)
        except zlib.error:
            return
    elif tarfile.is_tarfile(io.BytesIO(content)):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                file = archive.extractfile(member)
                yield from unpacked(file.read() if file else b"")


def in_files(folder: Path, forms: tuple[str, ...] = ()) -> dict[str, list[bytes]]:
    """Path -> finds, of the contents and the names of all files below a folder."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder)).encode("utf-8", "surrogateescape")
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if here := finds(name, forms) + finds(content, forms):
            found[str(path)] = here
    return found


def basic(user: str, password: str) -> str:
    """The header by which HTTP's basic authorization sends a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def children(pid: int) -> list[int]:
    """The processes that descend from `pid`."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]
