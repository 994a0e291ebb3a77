"""A manifest table on every node of a run: each has a copy in its table_cache.

Apart from table_cache, which processes use that do without torch.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from lightship import storage
from lightship.data import table_cache
from lightship.data.columns import Columns
from lightship.data.table_cache import Table
from lightship.distributed import comm

T = TypeVar("T")
_PIECE_BYTES = 4 * 2**20


def copy_to_node(table: Table) -> Columns:
    """This node's copy; its first rank makes it, from the URL or, in pieces, from rank 0's.

    Every rank; blocks.
    """
    if table.url is not None:
        comm.local_rank_0_first(partial(_fetch_if_there, table))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0" or not table_cache.shared_folder()
    is_missing = is_first and table_cache.local_copy(table) is None
    if comm.all_reduce_any(is_missing):
        _receive(table, is_missing)
    columns = table_cache.local_copy(table)
    assert columns is not None, "rank 0 has it until all have it"
    return columns


def _fetch_if_there(table: Table) -> None:
    """`fetch`, unless the URL is a path of another node's disk."""
    with contextlib.suppress(storage.NotFound):
        table_cache.fetch(table)


def _receive(table: Table, is_missing: bool) -> None:
    """Send the file of rank 0 to the nodes without it, in pieces. Every rank; blocks.

    Raises:
        LightshipError: On every rank, if one cannot write its copy.
    """
    with contextlib.ExitStack() as files:
        source = (
            files.enter_context(table_cache.path_of(table).open("rb")) if comm.is_rank_0() else None
        )

        def begin() -> BinaryIO | None:
            path = files.enter_context(table_cache.new_file()) if is_missing else None
            return files.enter_context(path.open("xb")) if path else None

        copy = _agreed(begin)
        while piece := comm.broadcast_from_rank_0(partial(_read_piece, source)):
            _agreed(partial(copy.write, piece) if copy else _nothing)
        _agreed(partial(_finish, copy, table) if copy else _nothing)


def _agreed(work: Callable[[], T]) -> T:
    """Call `work` on every rank; all raise if it cannot write on one. Every rank; blocks."""

    def explained() -> T:
        with table_cache.explained(table_cache.folder_of_copies()):
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
    table_cache.checked_copy(path, table)
    path.replace(table_cache.path_of(table))
