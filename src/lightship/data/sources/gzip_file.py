"""One gzipped file, unpacked as a whole: gzip cannot be read from the middle."""

import gzip
import shutil
import tempfile
import zlib

from lightship import storage
from lightship.errors import DataError

_IN_MEMORY_BYTES = 2**28


class Unpacked:
    """A gzipped file, unpacked in memory, or if large in a temporary file. For one thread; blocks.

    Raises:
        DataError: It is damaged.
    """

    def __init__(self, url: str):
        self.plain = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 (kept open)
        try:
            with storage.open_binary(url) as packed, gzip.GzipFile(fileobj=packed) as stream:
                shutil.copyfileobj(stream, self.plain, 2**20)
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
