"""The node's copies of manifest tables: one file for all ranks of a node.

A copy's name is its table's digest, so runs on the same data share it. The folder is the user's
alone (mode 0700). All bytes of a copy are checked when it is made. Each process that opens it later
checks its owner, length and header, whose hash is the digest; a copy that fails is removed and made
again. The columns are not read then: bytes that the disk has changed are not noticed. Where there
can be no such folder, a rank keeps copies in a temporary one of its own.
"""

import contextlib
import functools
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lightship import storage
from lightship.data.columns import TRAILER_BYTES, Columns, Trailer, parse_header
from lightship.data.private_folder import is_own_file, make_private
from lightship.errors import ConfigError, DataError, LightshipError
from lightship.versions import NewerVersion

logger = logging.getLogger(__name__)

_UNUSED_S, _ABANDONED_S = 30 * 86400.0, 86400.0
_END_BYTES = 2**16
"""Of a table, read at once: most have their header in it."""
_NAME = re.compile(r"[0-9a-f]{64}\.table")


@dataclass(frozen=True)
class Table:
    """A table, as ranks tell each other of it.

    Attributes:
        digest: Of the file.
        size_bytes: Its length.
        url: Where every node can read it; None: from rank 0.
    """

    digest: str
    size_bytes: int
    url: str | None

    @classmethod
    def at(cls, url: str) -> "Table":
        """The table that lies at a URL, by its last bytes. Blocks.

        Raises:
            NotFound: There is none.
            DataError: What is there is no table.
            NewerVersion: A newer version wrote it.
        """
        size_bytes = storage.size_bytes(url)
        start = max(0, size_bytes - TRAILER_BYTES)
        end = storage.read_range(url, start, size_bytes) if size_bytes else b""
        return cls(Trailer.parse(end, storage.redact(url)).digest, size_bytes, url)


def store(write: Callable[[Path], str]) -> Table:
    """Make a table on this node, unless it is there already. Rank 0; blocks.

    Args:
        write: Writes it to a path that does not exist; returns its digest.
    """
    with new_file() as path:
        digest = write(path)
        table = Table(digest, path.stat().st_size, None)
        if local_copy(table) is None:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(path_of(table))
    return table


def upload(table: Table, url: str) -> Table:
    """Put a table that `store` has made where every node can read it. Rank 0; blocks."""
    storage.write_file(url, path_of(table))
    return replace(table, url=url)


def fetch(table: Table, check: Callable[[Columns], None] | None = None) -> Columns:
    """This node's copy of a table that has a URL, copied from there if need be. Blocks.

    Args:
        table: Which.
        check: Called with a new copy, whose bytes are those of the digest.

    Raises:
        DataError: It was changed or is damaged.
    """
    if (columns := local_copy(table)) is None:
        assert table.url is not None
        _check_size(table, table.url)
        with new_file() as new_path:
            storage.download(table.url, new_path)
            try:
                new = checked_copy(new_path, table)
                if check is not None:
                    check(new)
            except DataError as error:
                text = str(error).replace(str(new_path), storage.redact(table.url))
                raise DataError(text) from error
            columns = Columns(new_path.replace(path_of(table)))
    return columns


def _check_size(table: Table, url: str) -> None:
    """Refuse, by its header alone, a file that is larger than a table. Blocks.

    Raises:
        DataError: It was changed or is damaged.
    """
    where, size_bytes = storage.redact(url), table.size_bytes
    start = max(0, size_bytes - _END_BYTES)
    end = storage.read_range(url, start, size_bytes)
    trailer = Trailer.parse(end[-TRAILER_BYTES:], where)
    if trailer.digest != table.digest:
        raise DataError(f"{where} has changed meanwhile")
    header_start = size_bytes - TRAILER_BYTES - trailer.header_bytes
    if 0 <= header_start < start:
        end = storage.read_range(url, header_start, start) + end
        start = header_start
    header = end[max(0, header_start - start) : -TRAILER_BYTES]
    parse_header(header, trailer, size_bytes, where)


def local_copy(table: Table) -> Columns | None:
    """This node's copy; None: there is none, or it was not the table of its name and is removed."""
    path = path_of(table)
    try:
        columns = Columns(path)
        if not is_own_file(columns.descriptor):
            raise DataError(f"{path} is another user's")
        if (columns.digest, columns.size_bytes) != (table.digest, table.size_bytes):
            raise DataError(f"{path} is another table")
    except OSError:  # missing, or a link, which a new copy replaces
        return None
    except (DataError, NewerVersion) as error:
        logger.warning(f"{error}; it is removed and made again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return columns


def checked_copy(path: Path, table: Table) -> Columns:
    """A new copy, all of whose bytes are read. Raises DataError if it is not the table."""
    columns = Columns(path)
    if columns.digest != table.digest or columns.size_bytes != table.size_bytes:
        raise DataError(f"{storage.redact(table.url or 'the table')} has changed meanwhile")
    columns.check_content()
    return columns


def path_of(table: Table) -> Path:
    """Where this node's copy is, or will be."""
    return folder_of_copies() / f"{table.digest}.table"


def folder_of_copies() -> Path:
    """The node's folder, or this process's own where there can be none."""
    return shared_folder() or _own_folder()


def shared_folder() -> Path | None:
    """The folder of this node's copies; None: there can be none."""
    folder = storage.cache_path("tables").absolute()
    return folder if _is_usable(folder) else None


@functools.cache
def _is_usable(folder: Path) -> bool:
    return make_private(folder, "tables of images are") and os.access(folder, os.W_OK)


def _own_folder() -> Path:
    return Path(_temporary().name)


@functools.cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    """Removed when this process exits."""
    return tempfile.TemporaryDirectory(prefix="lightship-tables-")


@contextmanager
def new_file() -> Iterator[Path]:
    """The path of a file to be written and then renamed; removed if that does not happen."""
    folder = folder_of_copies()
    path = folder / f".{uuid.uuid4().hex}"
    try:
        with explained(folder):
            _remove_old(folder)
            yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What cannot be written there is a ConfigError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LightshipError):
            raise
        raise ConfigError(
            f"{folder} cannot hold the table of images ({error}); LIGHTSHIP_CACHE names another "
            "place"
        ) from error


def _remove_old(folder: Path) -> None:
    """Remove copies that nobody has used for a month, and what killed processes left."""
    now_s = time.time()
    for path in folder.iterdir():
        bound_s = _UNUSED_S if _NAME.fullmatch(path.name) else _ABANDONED_S
        is_ours = bound_s == _UNUSED_S or path.name.startswith(".")
        # Another process may remove it first; and what cannot be removed, such as a file that NFS
        # keeps while it is open, only takes room: no reason to fail.
        with contextlib.suppress(OSError):
            if is_ours and now_s - path.lstat().st_mtime > bound_s:
                path.unlink()
