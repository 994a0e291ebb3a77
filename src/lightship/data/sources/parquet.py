"""Parquet files with images in a column, as the Hugging Face Hub lays them out."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lightship import storage
from lightship.data.sources.file_names import list_some
from lightship.data.sources.parquet_file import (
    class_names,
    image_columns,
    label_columns,
    open_parquet,
    require_pyarrow,
)
from lightship.data.sources.parquet_footer import RowGroup
from lightship.data.sources.parts import Found, Label, Part
from lightship.data.sources.split_names import split_of_name, split_words, splits_of_files
from lightship.errors import DataError

logger = logging.getLogger(__name__)
_SCAN_THREADS = 8


@dataclass
class _Scanned:
    """What one file holds."""

    name: str
    lengths: np.ndarray
    labels: Sequence[Label]
    class_names: list[str] | None
    images: list[str]
    """Columns that may hold images; the first is taken."""
    label_columns: list[str]


def scan_parquet(root_url: str, files: Sequence[str], root: str, labelled: bool = True) -> Found:
    """Rows of every file, in order; labels and class names as `sources.scan` says. Rank 0; blocks.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: A file is damaged, has no image or label column, or does not fit the others.
    """
    named = [file or storage.base_name(root_url) for file in files]
    splits = splits_of_files(named, root) if labelled else None
    if labelled:
        _check_one_configuration(files, splits, root)

    def scan_one(file: str) -> _Scanned:
        url = storage.join(root_url, file) if file else root_url
        return _scan_file(url, file or root, labelled)

    require_pyarrow()
    scanned = storage.parallel_map(scan_one, files, _SCAN_THREADS)
    _check_same_column("images", {each.name: each.images for each in scanned}, root)
    names = None
    if labelled:
        _check_same_column("labels", {each.name: each.label_columns for each in scanned}, root)
        names = _match_class_names(scanned, root)
    parts = [
        Part(
            splits[i] if splits else "train",
            [file],
            np.zeros(len(each.lengths), dtype=np.int32),
            np.arange(len(each.lengths)),
            each.lengths,
            each.labels,
        )
        for i, (file, each) in enumerate(zip(files, scanned, strict=True))
    ]
    return Found(parts, "parquet", class_names=names)


def _scan_file(url: str, name: str, labelled: bool) -> _Scanned:
    with open_parquet(url, name) as opened:
        parquet, schema = opened.file, opened.file.schema_arrow
        if not parquet.metadata.num_rows:  # its columns may be of any type
            return _Scanned(name, np.zeros(0, dtype=np.int64), [], None, [], [])
        images = image_columns(schema, name)
        lengths = _mean_lengths(opened.groups, images[0])
        labels: Sequence[Label] = [None] * len(lengths)
        columns, names = [], None
        if labelled:
            columns = label_columns(schema, name)
            labels = opened.labels(columns[0])
            names = class_names(schema, columns[0], name)
            if labels and all(label == -1 for label in labels):  # what the Hub writes for unknown
                labels = [None] * len(labels)
        if not len(labels) == len(lengths) == parquet.metadata.num_rows:
            raise DataError(f"{name} is damaged: its row groups have {len(lengths)} rows in all, "
                            f"its labels {len(labels)}")  # fmt: skip
    return _Scanned(name, lengths, labels, names, images, columns)


def _mean_lengths(groups: Sequence[RowGroup], column: str) -> np.ndarray:
    means = [group.chunks[column].unpacked_bytes // max(1, group.num_rows) for group in groups]
    rows = [group.num_rows for group in groups]
    return np.repeat(np.array(means, dtype=np.int64), np.array(rows, dtype=np.int64))


# ---- what the files have to have in common -----------------------------------------------------


def _check_same_column(what: str, columns: dict[str, list[str]], root: str) -> None:
    """Refuse files whose images or labels lie in different columns; name a choice among several."""
    columns = {name: each for name, each in columns.items() if each}
    first, taken = next(((name, each[0]) for name, each in columns.items()), ("", ""))
    for name, each in columns.items():
        if _shown(each[0]) != _shown(taken):
            raise DataError(
                f"{root}: the {what} of {first} are in the column {_shown(taken)}, those of {name} "
                f"in {_shown(each[0])}; give files of one kind"
            )
    if others := {_shown(c) for each in columns.values() for c in each[1:]} - {_shown(taken)}:
        logger.warning(
            f"{root}: the {what} are taken from the column {_shown(taken)}, not from "
            f"{list_some(others)}"
        )


def _shown(column: str) -> str:
    return column.removesuffix(".bytes")


def _match_class_names(scanned: Iterable[_Scanned], root: str) -> list[str] | None:
    """The class names of all files; where their lists differ, labels become names.

    Raises:
        DataError: A number without a name, or a file without names where the others' differ.
    """
    filled = [each for each in scanned if any(label is not None for label in each.labels)]
    with_names = [each for each in filled if each.class_names is not None]
    if not with_names:
        return None
    lists = {tuple(each.class_names or ()): each for each in reversed(with_names)}
    without = [each for each in filled if each.class_names is None and _is_numbered(each)]
    union = list(dict.fromkeys(name for each in with_names for name in each.class_names or ()))
    if without:
        if len(lists) > 1:
            raise DataError(
                f"{root}: {without[0].name} names no classes, and the lists of classes in the "
                "other files differ: what its numbers stand for is unknown"
            )
        logger.warning(
            f"{root}: {without[0].name} ({len(without)} such files) names no classes; its numbers "
            f"are taken to mean the same as in {with_names[0].name}"
        )
    elif len(lists) > 1 or not all(map(_is_numbered, filled)):
        for each in with_names:
            each.labels = _as_names(each, root)
    if len(lists) > 1:
        one, other = list(lists.values())[:2]
        logger.warning(
            f"{root}: {one.name} and {other.name} have different lists of classes, which are "
            f"matched by name: {len(union)} classes in all"
        )
    return union


def _is_numbered(scanned: _Scanned) -> bool:
    return any(isinstance(label, int) for label in scanned.labels)


def _as_names(scanned: _Scanned, root: str) -> list[Label]:
    names = scanned.class_names or []
    wrong = [x for x in scanned.labels if isinstance(x, int) and not 0 <= x < len(names)]
    if wrong:
        raise DataError(
            f"{root}: {len(wrong)} labels of {scanned.name} are out of range, such as {wrong[0]}; "
            f"with {len(names)} classes they must be 0 to {len(names) - 1}"
        )
    return [names[x] if isinstance(x, int) else x for x in scanned.labels]


# ---- configurations ----------------------------------------------------------------------------


def _check_one_configuration(files: Sequence[str], splits: Sequence[str] | None, root: str) -> None:
    """Refuse several configurations (subsets) of a repository: CONFIG/train-00000-of-00002.parquet,
    CONFIG/train/0000.parquet; their samples may be the same ones.

    Folders of splits and partitions (KEY=VALUE) are parts of one.
    """
    folders, split_folders = set(), dict[tuple[str, str], set[str]]()
    for i, file in enumerate(files):
        folder, split_folder = _configuration(file)
        folders.add(folder)
        if splits and split_folder:
            split_folders.setdefault((folder, splits[i]), set()).add(split_folder)
    several = [each for each in split_folders.values() if len(each) > 1]
    folders = folders if len(folders) > 1 or not several else several[0]
    if len(folders) > 1:
        raise DataError(
            f"{root}: the Parquet files lie in {len(folders)} folders "
            f"({list_some(folder or '.' for folder in folders)}), which may be different "
            "configurations of one data set; set --data.root to one of them, such as "
            f"{root.rstrip('/')}/{min(filter(None, folders))}, or move the files into one folder"
        )
    if len(prefixes := {before for file in files if (before := _prefix(file)) is not None}) > 1:
        logger.warning(
            f"{root}: the names of the Parquet files begin differently ({list_some(prefixes)}); "
            "all of them are taken as one data set"
        )


def _configuration(file: str) -> tuple[str, str]:
    """(the folder that tells configurations apart, that of the split or "") of a file."""
    *folders, base = file.split("/")
    split = split_of_name(base)
    for depth in reversed(range(len(folders))):
        named = split_of_name(folders[depth])
        if named and split in (None, named):
            return "/".join(folders[:depth]), "/".join(folders[: depth + 1])
    return "/".join(folder for folder in folders if "=" not in folder), ""


def _prefix(file: str) -> str | None:
    """What stands before the split's word in a file's name: `big-` of big-train-0.parquet."""
    base = file.rpartition("/")[2]
    words = split_words(base)
    return re.sub(r"\d+", "0", base[: base.lower().find(words[-1])]) if words else None
