"""Gzipped files, unpacked as a whole: gzip cannot be read from the middle."""

import contextlib
import gzip
import os
import tempfile
import zlib
from typing import Any

from lightship import storage
from lightship.errors import ConfigError, DataError
from lightship.storage.bounds import check_unpacked

_IN_MEMORY_BYTES, _PIECE_BYTES = 2**28, 2**20


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

    def tell(self) -> int:
        """How many bytes are unpacked."""
        return self._file.tell()

    def seek(self, at: int) -> int:
        """Go to the byte `at`, or the end if that comes first."""
        check_unpacked(at, self.packed_bytes, self.name)
        return self._file.seek(at)


class Unpacked:
    """A gzipped file, unpacked in memory, or if large in a temporary file. For one thread; blocks.

    Raises:
        DataError: It is damaged, or unpacks to far more than images do.
        ConfigError: The temporary file cannot be written.
    """

    def __init__(self, url: str):
        self.plain = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 (kept open)
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(self.close)
            try:
                with storage.open_binary(url) as packed:
                    source = Gunzipped(packed, storage.base_name(url))
                    while data := source.read(_PIECE_BYTES):
                        self._write(data, source)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"a damaged gzip file ({error})") from error
            unless_done.pop_all()

    def _write(self, data: bytes, source: Gunzipped) -> None:
        try:
            self.plain.write(data)
            self.plain.flush()  # here, not in `read` or `close`
        except OSError as error:
            raise ConfigError(
                f"{tempfile.tempdir} cannot hold {source.name} unpacked ({error}): it has "
                f"{source.packed_bytes} bytes packed and {source.tell()} or more unpacked; TMPDIR "
                "names another place"
            ) from error

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the unpacked file. Raises DataError if it is shorter."""
        self.plain.seek(offset)
        data = self.plain.read(length)
        if len(data) < length:
            raise DataError(f"truncated after {len(data)} bytes")
        return data

    def close(self) -> None:
        """Free the memory or the temporary file."""
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            self.plain.close()
