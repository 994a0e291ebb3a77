"""An .npz of integers, read within bounds: no objects, no shape beyond its bytes."""

import io
from typing import BinaryIO

import numpy as np

from lightship.storage.bounds import check_unpacked
from lightship.storage.zip_file import ZipFile

_MAX_HEADER_BYTES = 2**14  # NumPy itself reads no header of more than 10,000 characters


def read_npz(stream: BinaryIO, name: str) -> dict[str, np.ndarray]:
    """The arrays of what `numpy.savez_compressed` wrote, [N] of any integer type, read-only.

    Args:
        stream: The file.
        name: What to call it in messages.

    Raises:
        DataError: It is no zip, or unpacks to far more than it may (`storage.bounds`).
        ValueError: An array is of another kind, or its header does not fit its bytes.
    """
    packed_bytes = stream.seek(0, io.SEEK_END)
    archive = ZipFile(stream, name)
    total_bytes = sum(entry.file_size for entry in archive.entries.values())
    check_unpacked(total_bytes, packed_bytes, name)
    arrays = {}
    for path, entry in archive.entries.items():
        with archive.open(path) as file:
            content = file.read(entry.file_size)
        arrays[path.removesuffix(".npy")] = _array(content, path)
    return arrays


def _array(content: bytes, path: str) -> np.ndarray:
    stream = io.BytesIO(content[:_MAX_HEADER_BYTES])
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{path} is of another version of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    if dtype.kind not in "iu" or len(shape) != 1:
        raise ValueError(f"{path} is {dtype} of shape {shape!r:.80}")
    if shape[0] * dtype.itemsize != len(content) - start:
        raise ValueError(f"{path} is said to have {shape[0]} values, in {len(content)} bytes")
    return np.frombuffer(content, dtype, offset=start)
