"""How the parts that a scan finds become manifests: splits, class numbers, checks."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightship.data.manifest import LABELLED_SPLITS, Manifest
from lightship.data.names import (
    check_class_count,
    check_class_names,
    check_file_names,
    normal_form,
    printable,
)
from lightship.data.sources.file_names import count_by_suffix, list_some
from lightship.data.sources.parts import Found, Label, Labels, Part
from lightship.errors import DataError
from lightship.storage.file_list import FileList

logger = logging.getLogger(__name__)
_FEW_CLASSES, _MAX_CLASSES_PER_LABEL = 1000, 10


def build_manifests(found: Found, root_url: str, root: str) -> dict[str, Manifest]:
    """One manifest a split, with the same classes for all of them.

    Args:
        found: The parts, each in manifest order; parts of one split follow one another.
        root_url: `Manifest.root`.
        root: What to call it in messages.

    Raises:
        DataError: Labels are missing, out of range, of two kinds, or differ between splits.
    """
    by_split = {split: [p for p in found.parts if p.split == split] for split in LABELLED_SPLITS}
    labels = {
        split: _in_normal_form(_joined([part.labels for part in parts]))
        for split, parts in by_split.items()
    }
    for split, all_ in labels.items():
        if all_.values == [None]:
            logger.warning(f"{root}: the split {split} has no labels; not used")
            labels[split] = Labels.of([])
        elif without := len(all_.where(lambda label: label is None)):
            raise DataError(f"{root}: {without} of {len(all_)} samples of {split} have no label")
    labels = {split: all_ for split, all_ in labels.items() if len(all_)}
    if not labels:
        raise DataError(f"{root}: no sample has a label")
    if found.class_folders:
        _check_same_classes(
            {split: set(map(str, all_.values)) for split, all_ in labels.items()}, root
        )
    listed = None
    if found.class_names is not None:
        check_class_count(found.class_names, sum(map(len, labels.values())), root)
        listed = check_class_names(found.class_names, root)
    class_names, numbers = _number_labels(labels, listed, root)
    class_names = check_class_names(class_names, root)
    left = _not_read(found, root)
    check_file_names((file for part in found.parts for file in part.files), root)
    return {
        split: replace(
            _manifest(found, by_split[split], numbers[split], class_names, root_url),
            not_read=left,
        )
        for split in labels
    }


def build_unlabelled(found: Found, root_url: str, root: str) -> Manifest:
    """All parts as one manifest with label -1.

    No run keeps it, so its files and members may have names that are not UTF-8 (as surrogates).
    """
    size = sum(len(part.offset) for part in found.parts)
    label = np.broadcast_to(np.int64(-1), size)
    manifest = _manifest(found, found.parts, label, [], root_url)
    members = [name for part in found.parts for name in part.members or ()]
    return replace(
        manifest,
        members=members if len(members) == size else None,
        not_read=_not_read(found, root),
    )


def _joined(parts: Iterable[Sequence[Label] | Labels]) -> Labels:
    several = [part if isinstance(part, Labels) else Labels.of(part) for part in parts]
    values = Labels.of(value for labels in several for value in labels.values)
    ends = np.cumsum([len(labels.values) for labels in several])
    indices = [
        values.index[end - len(labels.values) : end][labels.index]
        for labels, end in zip(several, ends, strict=True)
    ]
    return Labels(values.values, np.concatenate([np.zeros(0, dtype=np.int32), *indices]))


def _in_normal_form(labels: Labels) -> Labels:
    """The labels with each name in composed form (NFC), so that one class has one spelling."""
    forms = Labels.of(normal_form(x) if isinstance(x, str) else x for x in labels.values)
    return Labels(forms.values, forms.index[labels.index])


def _not_read(found: Found, root: str) -> str:
    """What no reader takes, by suffix, or ""; a warning names it, and the ignored folders."""
    unread = count_by_suffix(found.not_read) if found.not_read else ""
    lines = [f"not read: {unread}, such as {printable(found.not_read[0])}"] if unread else []
    lines += [f"ignored: {list_some(found.ignored)}"] if found.ignored else []
    if lines:
        logger.warning(f"{root}: {'; '.join(lines)}")
    return unread


def _manifest(
    found: Found,
    parts: list[Part],
    label: np.ndarray,
    class_names: list[str],
    root_url: str,
) -> Manifest:
    starts = np.cumsum([0, *(len(part.files) for part in parts)])
    columns: dict[str, Any] = {
        "file_index": [
            np.asarray(part.file_index, dtype=np.int32) + np.int32(start)
            for start, part in zip(starts[:-1], parts, strict=True)
        ],
        "offset": [np.asarray(part.offset, dtype=np.int64) for part in parts],
        "length": [np.asarray(part.length, dtype=np.int64) for part in parts],
        "crc32": [
            np.broadcast_to(np.int64(-1), len(part.offset))
            if part.crc32 is None
            else np.asarray(part.crc32, dtype=np.int64)
            for part in parts
        ],
    }
    if len(parts) == 1:  # nothing is copied
        files, columns = parts[0].files, {name: array for name, [array] in columns.items()}
    else:
        files = FileList.of(file for part in parts for file in part.files)
        columns = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return Manifest(
        root=root_url,
        files=files,
        label=label,
        class_names=class_names,
        container=found.container,
        encoding=found.encoding,
        **columns,
    )


def _check_same_classes(classes: dict[str, set[str]], root: str) -> None:
    first, *others = classes
    for other in others:
        missing = {other: classes[first] - classes[other], first: classes[other] - classes[first]}
        differences = [
            f"{split} lacks {list_some(names)}" for split, names in missing.items() if names
        ]
        if differences:
            raise DataError(
                f"{root}: class folders differ between splits: {'; '.join(differences)}; add "
                "images, or remove the class from all splits"
            )


def _number_labels(
    labels: dict[str, Labels], class_names: list[str] | None, root: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    values = {value for each in labels.values() for value in each.values}
    kinds = set(map(type, values))
    if kinds == {str}:
        names = set(map(str, values))
        if class_names is None:
            class_names = sorted(names)
        elif names - set(class_names):
            raise DataError(f"{root}: labels not in the list of classes: "
                            f"{list_some(names - set(class_names))}")  # fmt: skip
        number = {name: i for i, name in enumerate(class_names)}
        numbered = {split: each.numbers(lambda x: number[str(x)]) for split, each in labels.items()}
        return class_names, numbered
    if kinds != {int}:
        raise DataError(f"{root}: some labels are numbers and some are text")
    numbers = {int(value) for value in values if value is not None}
    if class_names is None:
        class_names = _names_of_numbers(numbers, root)
    count = len(class_names)
    for split, each in labels.items():
        if len(wrong := each.where(lambda x: not 0 <= int(x or 0) < count)):
            first = each.values[each.index[wrong[0]]]
            raise DataError(
                f"{root}: {len(wrong)} labels of {split} are out of range, such as {first}; "
                f"with {count} classes they must be 0 to {count - 1}"
            )
    numbered = {split: each.numbers(lambda x: int(x or 0)) for split, each in labels.items()}
    return class_names, numbered


def _names_of_numbers(numbers: set[int], root: str) -> list[str]:
    """A class for each number from 0 to the largest.

    Raises:
        DataError: Most of them would be empty: the numbers are dates, codes, ids of another set.
    """
    count = max(0, *numbers) + 1
    if count > max(_FEW_CLASSES, _MAX_CLASSES_PER_LABEL * len(numbers)):
        raise DataError(
            f"{root}: the labels are {len(numbers)} different numbers up to {max(numbers)}, which "
            f"would make {count} classes; number the classes from 0, write their names as labels, "
            "or list a name for each number in classes.txt"
        )
    empty = sorted(set(range(count)) - numbers)
    if empty and min(numbers) >= 0:
        logger.warning(
            f"{root}: {len(empty)} of {count} classes have no image: no label is "
            f"{list_some(map(str, empty))}; labels count from 0"
        )
    return [str(i) for i in range(count)]
