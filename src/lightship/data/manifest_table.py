"""All splits as one file, which every process of a node maps into memory: of a run, or of a pack.

Beside the columns (see `columns.py`) it holds what would take a pass over them: bytes of a split,
fingerprint, row groups, the first sample without a label. So a process starts in time and memory
that do not depend on the number of samples.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightship.data.columns import Columns, ColumnWriter, Pieces
from lightship.data.manifest import LABELLED_SPLITS, Manifest
from lightship.data.mapped_split import NUMBERS, MappedSplit
from lightship.data.names import check_class_count, check_class_names
from lightship.errors import DataError
from lightship.redaction import canonical
from lightship.storage.bounds import MAX_FILE_BYTES
from lightship.storage.file_list import FileList
from lightship.storage.urls import stays_inside

_CONTAINERS = ("bytes", "gzip", "parquet")
_ENCODING = re.compile(r"image|raw:3x[1-9][0-9]{0,3}x[1-9][0-9]{0,3}")


def write_table(
    path: Path, manifests: Mapping[str, Manifest], held_out: np.ndarray | None = None
) -> str:
    """Write all splits, which have the same classes, to a new file; its digest. Blocks.

    The same splits give the same bytes. Columns are read and written piece by piece.

    Args:
        path: Of the file.
        manifests: The splits.
        held_out: [N] bool: the samples of train that become val; None: the splits as they are.
    """
    parts: dict[str, tuple[Manifest, np.ndarray | None]]
    parts = {split: (manifest, None) for split, manifest in manifests.items()}
    if held_out is not None:
        train = manifests["train"]
        parts |= {"train": (train, ~held_out), "val": (train, held_out)}
    with path.open("x+b") as file:
        out = ColumnWriter(file)
        summaries = {split: _write_split(out, split, *part) for split, part in parts.items()}
        class_names = next(iter(manifests.values())).class_names
        return out.finish({"class_names": class_names, "splits": summaries})


def _write_split(
    out: ColumnWriter, split: str, manifest: Manifest, chosen: np.ndarray | None
) -> dict[str, Any]:
    """Write the columns of the `chosen` samples ([N] bool; None: of all); their summary."""
    files = FileList.of(manifest.files)
    members = None if manifest.members is None else FileList.of(manifest.members)
    columns = {name: Pieces(getattr(manifest, name), chosen) for name in NUMBERS}
    if chosen is not None:
        files, numbers = manifest.files_of(columns["file_index"])
        columns["file_index"] = replace(columns["file_index"], numbers=numbers)
        members = None if members is None else members.select(chosen)
    for name, pieces in columns.items():
        out.add(f"{split}.{name}", pieces)
    _add_names(out, f"{split}.files", files)
    if members is not None:
        _add_names(out, f"{split}.members", members)
    written: dict[str, Any] = {name: out.read(f"{split}.{name}") for name in NUMBERS}
    rows = replace(manifest, files=files, members=members, mapped=None, **written)
    if rows.container == "parquet":
        out.add(f"{split}.edges", Pieces(rows.block_edges()))
    return {
        "root": canonical(rows.root),
        "size_bytes": rows.size_bytes,
        "first_unlabelled": rows.first_unlabelled,
        "fingerprint": rows.fingerprint(),
        "container": rows.container,
        "encoding": rows.encoding,
        "not_read": rows.not_read,
    }


def _add_names(out: ColumnWriter, name: str, names: FileList) -> None:
    out.add(name, Pieces(np.frombuffer(names.text, dtype=np.uint8)))
    out.add(f"{name}.starts", Pieces(names.starts))


def columns_of(manifests: Mapping[str, Manifest]) -> Columns | None:
    """The file whose splits these are, all of them as it has them; None: there is none."""
    summaries = [manifest.summary for manifest in manifests.values()]
    found = {summary.columns for summary in summaries if summary}
    if None in summaries or len(found) != 1:
        return None
    [columns] = found
    splits = [summary.split for summary in summaries if summary]
    return columns if splits == list(manifests) == list(columns.header["splits"]) else None


def open_table(columns: Columns, names: Collection[str] = LABELLED_SPLITS) -> dict[str, Manifest]:
    """The splits of a file that `write_table` made here, or `check_table` has accepted. Every rank.

    Args:
        columns: The file.
        names: Of splits that it may have.

    Raises:
        DataError: It is damaged where it is not a column.
    """
    splits = {}
    try:
        for split, summary in columns.header["splits"].items():
            check_name(split, names)
            mapped = MappedSplit.of(columns, split, summary)
            outside = {name: summary[name] for name in ("root", "not_read")}
            splits[split] = Manifest(**mapped.fields, mapped=mapped, **outside)
            check_description(split, splits[split])
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{columns.path} is damaged: {error!r:.200}") from error
    if splits:
        check_classes(str(columns.path), splits)  # also of a copy that an older version accepted
    return splits


def check_table(columns: Columns) -> None:
    """Refuse a file whose columns no scan makes. Reads all of it once, piece by piece; blocks.

    Args:
        columns: What `Columns.check_content` has accepted, from a place where others may write.

    Raises:
        DataError: It is damaged.
    """
    where, splits = str(columns.path), open_table(columns)
    if not splits:
        raise DataError(f"{where} is damaged: it has no split")
    for split, manifest in splits.items():
        rows = replace(manifest, mapped=None)
        check_split(where, split, rows, manifest.fingerprint())
        summaries = [(each.size_bytes, each.first_unlabelled) for each in (rows, manifest)]
        if summaries[0] != summaries[1]:
            raise DataError(f"{where}: the summary of {split} is not that of its columns")
        if isinstance(manifest.members, FileList) and not manifest.members.is_whole():
            raise DataError(f"{where} is damaged: its members do not follow one another")
        _check_edges(where, manifest)


def _check_edges(where: str, manifest: Manifest) -> None:
    """Refuse row groups that do not divide the samples."""
    if manifest.container == "parquet":
        edges = manifest.block_edges()
        if len(edges) < 2 or edges[0] or edges[-1] != len(manifest) or (np.diff(edges) <= 0).any():
            raise DataError(f"{where} is damaged: its row groups do not divide its samples")


def check_classes(where: str, splits: Mapping[str, Manifest]) -> None:
    """Raise DataError for class names of a file that no scan gives, all splits having the same."""
    names = next(iter(splits.values())).class_names
    check_class_count(names, sum(map(len, splits.values())), where)
    check_class_names(names, where)


def check_split(where: str, split: str, manifest: Manifest, fingerprint: str) -> None:
    """Refuse a split of a file that no scan makes. Reads it piece by piece.

    Args:
        where: What to call the file.
        split: Name of the split.
        manifest: The split, which `check_description` has accepted, with columns of one length.
        fingerprint: What it is said to be.

    Raises:
        DataError: It is damaged.
    """
    if not len(manifest):
        raise DataError(f"{where} is damaged: {split} has no sample")
    bounds = {
        "file_index": (0, len(manifest.files)),
        "label": (-1, len(manifest.class_names)),
        "crc32": (-1, 2**32),
    }
    for column in NUMBERS:
        least, end = bounds.get(column, (0, MAX_FILE_BYTES))
        low, high = Pieces(getattr(manifest, column)).bounds()
        if not least <= low <= high < end:
            raise DataError(f"{where} is damaged: {split}.{column} goes from {low} to {high}")
    if not manifest.length.sum(dtype=np.float64) < 2**62:
        raise DataError(f"{where} is damaged: {split} has more bytes than there are")
    assert isinstance(manifest.files, FileList)
    if not manifest.files.is_whole():
        raise DataError(f"{where} is damaged: its names do not follow one another")
    for file in manifest.files:
        if not stays_inside(file):  # whatever root takes the place of the file's own
            raise DataError(f"{where} names {file!r:.80}, which is not below its root")
    if manifest.fingerprint() != fingerprint:
        raise DataError(f"{where} is damaged: fingerprint of {split} differs")


def check_name(split: str, names: Collection[str] = LABELLED_SPLITS) -> None:
    """Raise ValueError for a split of another name: it would become the name of a folder."""
    if split not in names:
        raise ValueError(f"it has the split {split!r:.80}, not one of {', '.join(names)}")


def check_description(split: str, manifest: Manifest) -> None:
    """Raise ValueError for class names, a root, a container or an encoding that no scan gives."""
    names = manifest.class_names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names of {split} are {names!r:.80}")
    text = (manifest.root, manifest.container, manifest.encoding, manifest.not_read)
    is_text = all(isinstance(each, str) for each in text)
    is_known = is_text and _ENCODING.fullmatch(text[2])
    if not is_known or text[1] not in _CONTAINERS:
        raise ValueError(f"the root, container and encoding of {split} are {text[:3]!r:.80}")
