"""The CRC-32 of images and cached files."""

from zlib_ng.zlib_ng import crc32  # a twelfth of the time of Python's own

__all__ = ["crc32"]
