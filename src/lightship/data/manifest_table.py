"""All splits of a run as one file, which every process of a node maps into memory.

Beside the columns (see `columns.py`) it holds what would take a pass over them: bytes of a split,
fingerprint, row groups, the first sample without a label. So a process starts in time and memory
that do not depend on the number of samples.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightship.data.columns import Columns, ColumnWriter
from lightship.data.file_list import FileList
from lightship.data.manifest import Manifest, check_description
from lightship.data.mapped_split import NUMBERS, MappedSplit
from lightship.errors import DataError
from lightship.redaction import canonical
from lightship.storage.bounds import MAX_FILE_BYTES
from lightship.storage.urls import stays_inside

_AT_ONCE = 2**20


def write_table(path: Path, manifests: Mapping[str, Manifest]) -> str:
    """Write all splits, which have the same classes, to a new file; its digest. Blocks.

    The same splits give the same bytes.
    """
    summaries: dict[str, Any] = {}
    with path.open("xb") as file:
        out = ColumnWriter(file)
        for split, manifest in manifests.items():
            for column in NUMBERS:
                out.add(f"{split}.{column}", getattr(manifest, column))
            _add_names(out, f"{split}.files", FileList.of(manifest.files))
            if manifest.members is not None:
                _add_names(out, f"{split}.members", FileList.of(manifest.members))
            if manifest.container == "parquet":
                out.add(f"{split}.edges", manifest.block_edges())
            summaries[split] = {
                "root": canonical(manifest.root),
                "size_bytes": manifest.size_bytes,
                "first_unlabelled": manifest.first_unlabelled,
                "fingerprint": manifest.fingerprint(),
                "container": manifest.container,
                "encoding": manifest.encoding,
                "not_read": manifest.not_read,
            }
            class_names = manifest.class_names
        return out.finish({"class_names": class_names, "splits": summaries})


def _add_names(out: ColumnWriter, name: str, names: FileList) -> None:
    out.add(name, np.frombuffer(names.text, dtype=np.uint8))
    out.add(f"{name}.starts", names.starts)


def open_table(columns: Columns) -> dict[str, Manifest]:
    """The splits of a file that `write_table` made here, or `check_table` has accepted. Every rank.

    Raises:
        DataError: It is damaged where it is not a column.
    """
    splits = {}
    try:
        for split, summary in columns.header["splits"].items():
            mapped = MappedSplit.of(columns, split, summary)
            outside = {name: summary[name] for name in ("root", "not_read")}
            splits[split] = Manifest(**mapped.fields, mapped=mapped, **outside)
            check_description(split, splits[split])
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{columns.path} is damaged: {error!r:.200}") from error
    return splits


def check_table(columns: Columns) -> None:
    """Refuse a file whose columns no scan makes. Reads all of it once, piece by piece; blocks.

    Args:
        columns: What `Columns.check_content` has accepted, from a place where others may write.

    Raises:
        DataError: It is damaged.
    """
    path, splits = columns.path, open_table(columns)
    if not splits:
        raise DataError(f"{path} is damaged: it has no split")
    for split, manifest in splits.items():
        if not len(manifest):
            raise DataError(f"{path} is damaged: {split} has no sample")
        bounds = {
            "file_index": (0, len(manifest.files)),
            "label": (-1, len(manifest.class_names)),
            "crc32": (-1, 2**32),
        }
        total, first_unlabelled = 0, None
        for start in range(0, len(manifest), _AT_ONCE):
            for column in NUMBERS:
                values = getattr(manifest, column)[start : start + _AT_ONCE]
                least, end = bounds.get(column, (0, MAX_FILE_BYTES))
                low, high = int(values.min()), int(values.max())
                if not least <= low <= high < end:
                    raise DataError(
                        f"{path} is damaged: {split}.{column} goes from {low} to {high}"
                    )
                if column == "length":
                    total += int(values.sum(dtype=np.int64))
                if column == "label" and low < 0 and first_unlabelled is None:
                    first_unlabelled = start + int(np.argmax(values < 0))
        mapped = manifest.mapped
        assert mapped is not None
        if (total, first_unlabelled) != (mapped.size_bytes, mapped.first_unlabelled):
            raise DataError(f"{path} is damaged: the summary of {split} is not that of its columns")
        _check_names(path, manifest)
        _check_edges(path, manifest)
        if replace(manifest, mapped=None).fingerprint() != mapped.fingerprint:
            raise DataError(f"{path} is damaged: fingerprint of {split} differs")


def _check_names(path: Path, manifest: Manifest) -> None:
    """Refuse names that are no text, overlap, or lie outside the root."""
    assert isinstance(manifest.files, FileList)
    for names in (manifest.files, manifest.members):
        if isinstance(names, FileList) and not names.is_whole():
            raise DataError(f"{path} is damaged: its names do not follow one another")
    for file in manifest.files:
        if not stays_inside(file):  # whatever root takes the place of the file's own
            raise DataError(f"{path} names {file!r:.80}, which is not below its root")


def _check_edges(path: Path, manifest: Manifest) -> None:
    """Refuse row groups that do not divide the samples."""
    if manifest.container == "parquet":
        edges = manifest.block_edges()
        if len(edges) < 2 or edges[0] or edges[-1] != len(manifest) or (np.diff(edges) <= 0).any():
            raise DataError(f"{path} is damaged: its row groups do not divide its samples")
