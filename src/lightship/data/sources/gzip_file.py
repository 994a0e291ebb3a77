"""Gzipped files, unpacked as a whole: gzip cannot be read from the middle."""

import gzip
import os
import shutil
import tempfile
import zlib
from typing import Any

from lightship import storage
from lightship.errors import DataError
from lightship.storage.bounds import check_unpacked

_IN_MEMORY_BYTES = 2**28


class Gunzipped:
    """A gzipped file as the plain one; seeking forward unpacks, backward begins anew. Blocks.

    Raises:
        DataError: It unpacks to far more than images do (`storage.bounds`).

    Args:
        packed: The gzipped file.
        name: What to call it in messages.
    """

    def __init__(self, packed: Any, name: str):
        self.packed_bytes, self.name = packed.seek(0, os.SEEK_END), name
        packed.seek(0)
        self._file = gzip.GzipFile(fileobj=packed)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        data = self._file.read(size)
        check_unpacked(self._file.tell(), self.packed_bytes, self.name)
        return data

    def seek(self, at: int) -> int:
        """Go to the byte `at`, or the end if that comes first."""
        check_unpacked(at, self.packed_bytes, self.name)
        return self._file.seek(at)


class Unpacked:
    """A gzipped file, unpacked in memory, or if large in a temporary file. For one thread; blocks.

    Raises:
        DataError: It is damaged, or unpacks to far more than images do.
    """

    def __init__(self, url: str):
        self.plain = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 (kept open)
        try:
            with storage.open_binary(url) as packed:
                source: Any = Gunzipped(packed, storage.base_name(url))
                shutil.copyfileobj(source, self.plain, 2**20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"a damaged gzip file ({error})") from error

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the unpacked file. Raises DataError if it is shorter."""
        self.plain.seek(offset)
        data = self.plain.read(length)
        if len(data) < length:
            raise DataError(f"truncated after {len(data)} bytes")
        return data

    def close(self) -> None:
        """Free the memory or the temporary file."""
        self.plain.close()
