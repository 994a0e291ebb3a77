"""What an archive may unpack to and hold: bounds that no real data set meets (docs/data.md)."""

from lightship.errors import DataError

MAX_FILE_BYTES = 2**48
"""Of a file, and of an archive's member: sums of sizes stay far below an int64."""
MAX_NAME_BYTES = 4096
"""Of a path in an archive: Linux's own limit of a path."""
MAX_TAR_METADATA_BYTES = 2**20
"""Of the block before a tar's member that holds its long name or its PAX records."""
MAX_ZIP_DIRECTORY_BYTES, MAX_ZIP_ENTRIES = 2**29, 5_000_000
_FREE_BYTES, _MAX_RATIO = 2**28, 100


def max_unpacked_bytes(packed_bytes: int) -> int:
    """256 MiB, and 100 bytes for each byte that is stored: images are compressed already."""
    return _FREE_BYTES + _MAX_RATIO * packed_bytes


def check_unpacked(unpacked_bytes: int, packed_bytes: int, what: str) -> None:
    """Raise DataError, with the bound and what to do, if `what` unpacks to more than it may."""
    bound = max_unpacked_bytes(packed_bytes)
    if unpacked_bytes > bound:
        raise DataError(
            f"{what} unpacks from {packed_bytes} bytes to {unpacked_bytes} or more; at most "
            f"{bound} are read ({_FREE_BYTES >> 20} MiB and {_MAX_RATIO} times its size); unless "
            "it is made to exhaust memory, unpack it first"
        )
