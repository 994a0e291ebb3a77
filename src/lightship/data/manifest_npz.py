"""The manifests of runs and packs of version 0.1.0: a compressed .npz, which is only read."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from lightship import storage, versions
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import (
    check_classes,
    check_description,
    check_name,
    check_split,
)
from lightship.data.mapped_split import NUMBERS
from lightship.data.npz import read_npz
from lightship.errors import DataError, LightshipError
from lightship.storage.file_list import FileList

_FORMAT = "manifest"
_READ_AT_ONCE_BYTES, _MAX_HEADER_BYTES, _MAX_CONTAINERS = 2**28, 2**26, 2**20
_FREE_SAMPLES, _MAX_SAMPLES_PER_BYTE = 2**20, 16  # the smallest tables have a byte a sample


def load_manifests(url: str) -> dict[str, Manifest]:
    """Read the splits of such a file, in memory of several times their table. Rank 0; blocks.

    Raises:
        DataError: The file is damaged.
        NewerVersion: A newer version wrote it.
    """
    where = storage.redact(url)
    try:
        with _open(url) as stream:
            size_bytes = stream.seek(0, io.SEEK_END)
            arrays = read_npz(stream, where)
        header = json.loads(_checked_header(arrays["header"].tobytes()))
        versions.check(_FORMAT, header["format"], where)
        max_samples = _FREE_SAMPLES + _MAX_SAMPLES_PER_BYTE * size_bytes
        loaded = {}
        for split, about in header["splits"].items():
            check_name(split)
            manifest = _loaded(split, about, arrays, max_samples)
            check_split(where, split, manifest, about["fingerprint"])
            loaded[split] = _signed(manifest)
        if len({tuple(manifest.class_names) for manifest in loaded.values()}) != 1:
            raise ValueError("it has no split, or splits of different classes")
        check_classes(where, loaded)
    except LightshipError:
        raise
    except Exception as error:  # zip, NumPy and JSON raise anything on damaged bytes
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{where} is not a manifest or is damaged: {reason:.200}") from error
    return loaded


def _open(url: str) -> BinaryIO:
    """The file; read at once, unless it is large."""
    try:
        return io.BytesIO(storage.read_small(url, _READ_AT_ONCE_BYTES))
    except storage.TooLarge:
        return storage.open_binary(url)


def _checked_header(data: bytes) -> bytes:
    """JSON whose values take little more memory than its text. Raises ValueError."""
    containers = data.count(b"[") + data.count(b"{")
    if len(data) > _MAX_HEADER_BYTES or containers > _MAX_CONTAINERS:
        raise ValueError(f"its header has {len(data)} bytes and {containers} lists")
    return data


def _loaded(
    split: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], max_samples: int
) -> Manifest:
    """One split as it was saved. Raises ValueError for one that does not fit the file."""
    if (count := len(arrays[f"{split}.label"])) > max_samples:
        raise ValueError(f"{split} has {count} samples; at most {max_samples} fit in the file")
    files = arrays[f"{split}.files"].tobytes()
    if files.count(0) > max_samples:
        raise ValueError(f"{split} has {files.count(0)} files")
    columns: dict[str, Any] = {column: arrays[f"{split}.{column}"] for column in NUMBERS}
    for column, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{split}.{column} has {len(values)} values of {count}")
    manifest = Manifest(
        root=about["root"],
        files=FileList.from_text(files),
        class_names=about["class_names"],
        container=about["container"],
        encoding=about["encoding"],
        **columns,
    )
    check_description(split, manifest)
    return manifest


def _signed(manifest: Manifest) -> Manifest:
    """With int64 in place of uint64, of which sums with int64 are floats."""
    wide = {name: values for name in NUMBERS if (values := getattr(manifest, name)).itemsize == 8}
    return replace(manifest, **{name: values.astype(np.int64) for name, values in wide.items()})
