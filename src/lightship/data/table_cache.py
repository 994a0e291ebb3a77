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
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from lightship import storage
from lightship.data.columns import TRAILER_BYTES, Columns, Trailer
from lightship.data.private_folder import is_own_file, make_private
from lightship.distributed import comm
from lightship.errors import ConfigError, DataError, LightshipError
from lightship.versions import NewerVersion

T = TypeVar("T")
logger = logging.getLogger(__name__)

_UNUSED_S, _ABANDONED_S = 30 * 86400.0, 86400.0
_NAME = re.compile(r"[0-9a-f]{64}\.table")
_PIECE_BYTES = 4 * 2**20


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
    with _new_file() as path:
        digest = write(path)
        table = Table(digest, path.stat().st_size, None)
        if local_copy(table) is None:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(_path(table))
    return table


def upload(table: Table, url: str) -> Table:
    """Put a table that `store` has made where every node can read it. Rank 0; blocks."""
    storage.write_file(url, _path(table))
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
        with _new_file() as new_path:
            storage.download(table.url, new_path)
            try:
                new = _checked(new_path, table)
                if check is not None:
                    check(new)
            except DataError as error:
                text = str(error).replace(str(new_path), storage.redact(table.url))
                raise DataError(text) from error
            columns = Columns(new_path.replace(_path(table)))
    return columns


def copy_to_node(table: Table) -> Columns:
    """This node's copy; its first rank makes it, from the URL or, in pieces, from rank 0's.

    Every rank; blocks.
    """
    if table.url is not None:
        comm.local_rank_0_first(partial(_fetch_if_there, table))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0" or not _shared_folder()
    is_missing = is_first and local_copy(table) is None
    if comm.all_reduce_any(is_missing):
        _receive(table, is_missing)
    columns = local_copy(table)
    assert columns is not None, "rank 0 has it until all have it"
    return columns


def _fetch_if_there(table: Table) -> None:
    """`fetch`, unless the URL is a path of another node's disk."""
    with contextlib.suppress(storage.NotFound):
        fetch(table)


def local_copy(table: Table) -> Columns | None:
    """This node's copy; None: there is none, or it was not the table of its name and is removed."""
    path = _path(table)
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


def _receive(table: Table, is_missing: bool) -> None:
    """Send the file of rank 0 to the nodes without it, in pieces. Every rank; blocks.

    Raises:
        LightshipError: On every rank, if one cannot write its copy.
    """
    with contextlib.ExitStack() as files:
        source = files.enter_context(_path(table).open("rb")) if comm.is_rank_0() else None

        def begin() -> BinaryIO | None:
            path = files.enter_context(_new_file()) if is_missing else None
            return files.enter_context(path.open("xb")) if path else None

        copy = _agreed(begin)
        while piece := comm.broadcast_from_rank_0(partial(_read_piece, source)):
            _agreed(partial(copy.write, piece) if copy else _nothing)
        _agreed(partial(_finish, copy, table) if copy else _nothing)


def _agreed(work: Callable[[], T]) -> T:
    """Call `work` on every rank; all raise if it cannot write on one. Every rank; blocks."""

    def explained() -> T:
        with _explained(_folder()):
            return work()

    return comm.on_every_rank(explained)


def _nothing() -> None:
    """The work of a rank that has the table."""


def _read_piece(source: BinaryIO | None) -> bytes:
    assert source is not None, "rank 0 reads"
    return source.read(_PIECE_BYTES)


def _finish(copy: BinaryIO, table: Table) -> None:
    """Check a copy that is written, and put it in its place."""
    copy.flush()
    os.fsync(copy.fileno())
    path = Path(copy.name)
    _checked(path, table)
    path.replace(_path(table))


def _checked(path: Path, table: Table) -> Columns:
    columns = Columns(path)
    if columns.digest != table.digest or columns.size_bytes != table.size_bytes:
        raise DataError(f"{storage.redact(table.url or 'the table')} has changed meanwhile")
    columns.check_content()
    return columns


def _path(table: Table) -> Path:
    return _folder() / f"{table.digest}.table"


def _folder() -> Path:
    return _shared_folder() or _own_folder()


def _shared_folder() -> Path | None:
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
def _new_file() -> Iterator[Path]:
    """The path of a file to be written and then renamed; removed if that does not happen."""
    folder = _folder()
    path = folder / f".{uuid.uuid4().hex}"
    try:
        with _explained(folder):
            _remove_old(folder)
            yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
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
