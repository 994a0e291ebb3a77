"""Storage: files at any fsspec URL, with deadlines, retries and whole writes.

The only importer of fsspec. Every function blocks, returns or raises within a bound, and may be
called by any rank and thread, also in a child after fork.
"""

from lightship.storage.api import (
    cached_download,
    check_writable,
    download,
    exists,
    is_link,
    list_files,
    list_table,
    make_ready,
    modified_s,
    move,
    read_small,
    refuse_link,
    remove,
    remove_folder,
    remove_temporaries,
    write_bytes,
    write_file,
)
from lightship.storage.backend import Data, FileInfo, Span
from lightship.storage.errors import Denied, NotFound, StorageTimeout, TooLarge, is_file_error
from lightship.storage.obstore_s3 import Access
from lightship.storage.parallel import Executor, in_daemon, parallel_map
from lightship.storage.reads import ReadAhead, read_bytes, read_range, read_spans
from lightship.storage.registry import access, adopt, may_hand_over, open_binary, size_bytes
from lightship.storage.retry import Limits, short_deadline
from lightship.storage.urls import (
    base_name,
    cache_path,
    is_private,
    is_remote,
    join,
    local_path,
    redact,
)

__all__ = [
    "Access",
    "Data",
    "Denied",
    "Executor",
    "FileInfo",
    "Limits",
    "NotFound",
    "ReadAhead",
    "Span",
    "StorageTimeout",
    "TooLarge",
    "access",
    "adopt",
    "base_name",
    "cache_path",
    "cached_download",
    "check_writable",
    "download",
    "exists",
    "in_daemon",
    "is_file_error",
    "is_link",
    "is_private",
    "is_remote",
    "join",
    "list_files",
    "list_table",
    "local_path",
    "make_ready",
    "may_hand_over",
    "modified_s",
    "move",
    "open_binary",
    "parallel_map",
    "read_bytes",
    "read_range",
    "read_small",
    "read_spans",
    "redact",
    "refuse_link",
    "remove",
    "remove_folder",
    "remove_temporaries",
    "short_deadline",
    "size_bytes",
    "write_bytes",
    "write_file",
]  # fmt: skip
