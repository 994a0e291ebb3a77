"""The CIFAR-10/100 python archives (A. Krizhevsky, 2009): pickles, read without running code."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightship.data.sources.parts import Found, Label, Part
from lightship.errors import DataError

ENCODING = "raw:3x32x32"
_ROW_BYTES = 3 * 32 * 32
_SPLITS = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}
_SPLITS_100 = {"train": "train", "test": "test"}
_META, _META_100 = "batches.meta", "meta"


def cifar_files(paths: Sequence[str]) -> dict[str, str] | None:
    """{base name: path} of a CIFAR archive's files among `paths`; None if they are not one."""
    by_name = {path.rpartition("/")[2]: path for path in paths}
    for splits, meta in ((_SPLITS, _META), (_SPLITS_100, _META_100)):
        if meta in by_name and any(name in by_name for name in splits):
            return {name: by_name[name] for name in [meta, *splits] if name in by_name}
    return None


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
        raw = read(files[name])
        batch = _load(raw, root)
        data, labels = batch.get("data"), batch.get("fine_labels" if is_100 else "labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
            raise DataError(f"{root}: {files[name]} holds no uint8 table `data`")
        if not isinstance(labels, list) or data.shape != (len(labels), _ROW_BYTES):
            raise DataError(
                f"{root}: {files[name]} holds data of shape {data.shape}; expected one label and "
                f"{_ROW_BYTES} bytes a row"
            )
        first_row = raw.find(data.tobytes())
        if first_row < 0:
            raise DataError(f"{root}: the rows of {files[name]} do not lie in one piece")
        if not all(isinstance(label, int | np.integer) for label in labels):
            raise DataError(f"{root}: the labels of {files[name]} are not all whole numbers")
        file, start = place(files[name])
        offset = start + first_row + _ROW_BYTES * np.arange(len(labels), dtype=np.int64)
        numbers: list[Label] = [int(label) for label in labels]
        zeros = np.zeros(len(labels), dtype=np.int32)
        parts.append(Part(split, [file], zeros, offset, zeros + _ROW_BYTES, numbers))
    if not isinstance(names, list) or not names:
        raise DataError(f"{root}: its meta file names no classes")
    return Found(parts, encoding=ENCODING, class_names=[_text(name) for name in names])


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _load(raw: bytes, root: str) -> dict[str, Any]:
    try:
        table = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{root}: {error}") from error
    except Exception as error:  # an unpickler raises whatever damaged bytes lead it into
        raise DataError(f"{root}: a damaged pickle ({type(error).__name__}: {error})") from error
    if not isinstance(table, dict):
        raise DataError(f"{root}: a pickle that holds a {type(table).__name__}, not a table")
    return {_text(key): value for key, value in table.items()}


def _encode_latin1(text: str, codec: str) -> bytes:
    if _text(codec) != "latin1":
        raise DataError(f"a pickle that asks for the codec {codec!r}")
    return text.encode("latin-1")


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers, text and numpy arrays; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise DataError(f"a pickle that asks for {module}.{name}, which no CIFAR archive needs; "
                        "nothing of it was run")  # fmt: skip
