"""Archives: the entries of a zip, a tar or another archive as files."""
# ruff: noqa: D102 (see backend.Backend)

import contextlib
import re
import threading
import zipfile
from typing import Any, BinaryIO

from lightship.errors import DataError, LightshipError
from lightship.storage.backend import Data
from lightship.storage.fsspec_backend import Remote
from lightship.storage.retry import Deadline
from lightship.storage.urls import redact

_DOS = 0
_DRIVE = re.compile(r"^[A-Za-z]:/")


class Archive(Remote):
    """An open archive, read-only.

    Args:
        fs: Its file system.
    """

    def __init__(self, fs: Any):
        super().__init__(fs, is_read_only=True)
        if fs.protocol == "zip":
            plain_names(fs.zip)
        # zipfile serves several threads, tarfile does not.
        self.turn: Any = contextlib.nullcontext() if fs.protocol == "zip" else threading.Lock()
        fs.find("")  # fills its index, which two threads must not do at once

    def read(self, deadline: Deadline, path: str, start: int, end: int | None) -> Data:
        """What goes wrong is the entry's fault, unless the storage or the system says otherwise."""
        if (size := self.size(deadline, path)) is None:
            raise IsADirectoryError(path)
        try:
            with self.turn:
                data = self.get(deadline, path, start, end)
        except (LightshipError, MemoryError):
            raise
        except Exception as error:  # an unknown method, a password, any damage
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error) or type(error).__name__
            raise DataError(f"{redact(path)} cannot be read from its archive ({reason})") from error
        if end is not None and len(data) != end - start:
            raise DataError(
                f"{redact(path)} has {size} bytes according to its archive, but {len(data)} came "
                f"where {end - start} were expected: the archive is damaged"
            )
        return data

    def open(self, deadline: Deadline, path: str) -> BinaryIO:
        return self.fs.open(path, "rb")


def plain_names(archive: zipfile.ZipFile) -> None:
    r"""Rename the entries of an open zip: `/a/b`, `./a/b`, `a\b` and `C:\a\b` become `a/b`.

    A backslash separates where the zip was made on Windows, or where no name has a slash. Entries
    are then read by the new names, because zipfile compares their headers with `orig_filename`.
    """
    entries = archive.infolist()
    has_slashes = any("/" in entry.filename for entry in entries)
    for entry in entries:
        name = entry.filename
        if "\\" in name and (entry.create_system == _DOS or not has_slashes):
            name = name.replace("\\", "/")
        folder = "/" if name.endswith("/") else ""
        parts = _DRIVE.sub("", name).split("/")
        entry.filename = "/".join(part for part in parts if part not in ("", ".", "..")) + folder
    archive.NameToInfo = {entry.filename: entry for entry in entries}
