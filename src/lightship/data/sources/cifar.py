"""The CIFAR-10/100 python archives (A. Krizhevsky, 2009): pickles, read without running code."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lightship.data.sources import plain_pickle
from lightship.data.sources.parts import Found, Label, Part
from lightship.errors import DataError

ENCODING = "raw:3x32x32"
_ROW_BYTES = 3 * 32 * 32
_SPLITS = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}
_SPLITS_100 = {"train": "train", "test": "test"}
_META, _META_100 = "batches.meta", "meta"
MAX_CIFAR_BYTES = 2**29
"""Of all files of an archive, which are read whole; CIFAR-10 and CIFAR-100 have 186 MB each."""


_NAMES = {*_SPLITS, *_SPLITS_100, _META, _META_100}


def cifar_files(paths: Iterable[str]) -> dict[str, str] | None:
    """{base name: path} of a CIFAR archive's files among `paths`; None if they are not one."""
    by_name = {path.rpartition("/")[2]: path for path in paths if may_be_cifar(path)}
    for splits, meta in ((_SPLITS, _META), (_SPLITS_100, _META_100)):
        if meta in by_name and any(name in by_name for name in splits):
            return {name: by_name[name] for name in [meta, *splits] if name in by_name}
    return None


def may_be_cifar(path: str) -> bool:
    """Whether the name is that of a file of a CIFAR archive."""
    return path.rpartition("/")[2] in _NAMES


def check_cifar_size(size_bytes: int, where: str) -> None:
    """Raise DataError for files of a CIFAR archive that are too large to be read whole."""
    if size_bytes > MAX_CIFAR_BYTES:
        raise DataError(
            f"{where}: the files with names of a CIFAR archive's hold {size_bytes} bytes; at most "
            f"{MAX_CIFAR_BYTES} are read: rename them, if it is another set"
        )


def scan_cifar(
    files: Mapping[str, str],
    read: Callable[[str], bytes],
    place: Callable[[str], tuple[str, int]],
    root: str,
) -> Found:
    """The rows of the batches, each at its own place among the pickle's bytes.

    Args:
        files: What `cifar_files` gave.
        read: The bytes of a path.
        place: (file of the manifest, offset of the path's first byte in it).
        root: What to call the root.

    Raises:
        DataError: A pickle asks for anything but plain data, or is not a CIFAR batch.
    """
    is_100 = _META_100 in files
    meta = _load(read(files[_META_100 if is_100 else _META]), root)
    names = meta.get("fine_label_names" if is_100 else "label_names")
    parts = []
    for name, split in (_SPLITS_100 if is_100 else _SPLITS).items():
        if name not in files:
            continue
        batch = _load(read(files[name]), root)
        data, labels = batch.get("data"), batch.get("fine_labels" if is_100 else "labels")
        if not isinstance(data, plain_pickle.Table) or len(data.shape) != 2:
            raise DataError(f"{root}: {files[name]} holds no uint8 table `data`")
        if not isinstance(labels, list) or data.shape != (len(labels), _ROW_BYTES):
            raise DataError(
                f"{root}: {files[name]} holds data of shape {data.shape}; expected one label and "
                f"{_ROW_BYTES} bytes a row"
            )
        if data.start is None:
            raise DataError(
                f"{root}: the rows of {files[name]} do not lie in one piece; write it with "
                "pickle protocol 3 or newer"
            )
        if not all(type(label) is int for label in labels):
            raise DataError(f"{root}: the labels of {files[name]} are not all whole numbers")
        file, start = place(files[name])
        offset = start + data.start + _ROW_BYTES * np.arange(len(labels), dtype=np.int64)
        numbers: list[Label] = labels
        zeros = np.zeros(len(labels), dtype=np.int32)
        parts.append(Part(split, [file], zeros, offset, zeros + _ROW_BYTES, numbers))
    if not isinstance(names, list) or not names:
        raise DataError(f"{root}: its meta file names no classes")
    return Found(parts, encoding=ENCODING, class_names=list(map(_plain, names)))


def _plain(value: Any) -> Any:
    """Text of Python 2 as text."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _load(raw: bytes, root: str) -> dict[str, Any]:
    try:
        table = plain_pickle.load(raw)
    except DataError as error:
        raise DataError(f"{root}: {error}") from error
    if not isinstance(table, dict):
        raise DataError(f"{root}: a pickle that holds a {type(table).__name__}, not a table")
    return {str(_plain(key)): value for key, value in table.items()}
