"""What the scanners hand over (parts), and how parts become manifests: splits, classes, checks."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightship.data.manifest import Manifest
from lightship.data.names import check_class_names, check_file_names, normal_form, printable
from lightship.errors import DataError

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "tif", "tiff", "bmp"}
IMAGE_SUFFIXES |= {"ppm", "pgm", "pbm", "pnm"}
_SYSTEM_FOLDERS = {
    "__macosx", "lost+found", "$recycle.bin", "recycler", "system volume information", "@eadir",
    "@recycle", "#recycle", "#snapshot", "@snapshot",
}  # fmt: skip
_LISTED = 5
_SPLITS = ("train", "val", "test")
_FEW_CLASSES, _MAX_CLASSES_PER_LABEL = 1000, 10

Label = str | int | None
"""A class by name or by number; None: unlabelled."""


@dataclass
class Part:
    """Samples of one split from one scanned file or folder, in manifest order (see `Manifest`)."""

    split: str
    files: list[str]
    file_index: Sequence[int] | np.ndarray
    offset: Sequence[int] | np.ndarray
    length: Sequence[int] | np.ndarray
    labels: Sequence[Label]
    crc32: Sequence[int] | np.ndarray | None = None
    members: Sequence[str] | None = None


@dataclass
class Found:
    """All that was found at a root."""

    parts: list[Part]
    container: Literal["bytes", "gzip", "parquet"] = "bytes"
    encoding: str = "image"
    class_names: list[str] | None = None
    """None: the sorted names, or the numbers from 0, that the labels show."""
    class_folders: bool = False
    """Labels are folders, so that every split must have the same."""
    not_read: list[str] = field(default_factory=list)
    """Paths of the files that no reader takes."""
    ignored: list[str] = field(default_factory=list)
    """Folders that are left out whole: of the system, of runs."""


def suffix(path: str) -> str:
    """The lower-case extension of a path without its dot, "" without one."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image(path: str) -> bool:
    """Whether the extension is that of an image."""
    return suffix(path) in IMAGE_SUFFIXES


def is_ignored(path: str) -> bool:
    """Hidden files, and what systems and archivers leave behind."""
    parts = path.split("/")
    return (
        any(part.startswith(".") and part != "." for part in parts)
        or system_folder(path) is not None
        or parts[-1].lower() in ("thumbs.db", "desktop.ini", "")
    )


def system_folder(path: str) -> str | None:
    """The folder in a path that is a system's own, such as lost+found; None without one."""
    parts = path.split("/")
    for depth, part in enumerate(parts):
        if part.lower() in _SYSTEM_FOLDERS:
            return "/".join(parts[: depth + 1])
    return None


def seen(paths: Iterable[str]) -> str:
    """The listing in a few words: `12 .txt files, 1 .md file`, or `no files`."""
    counts = Counter(suffix(path) for path in paths)
    listed = counts.most_common(_LISTED)
    words = [
        f"{count} {'.' + ext if ext else 'extensionless'} file{'s' * (count > 1)}"
        for ext, count in listed
    ]
    if rest := counts.total() - sum(count for _, count in listed):
        words.append(f"{rest} of {len(counts) - len(listed)} other kinds")
    return ", ".join(words) or "no files"


def build_manifests(found: Found, root_url: str, root: str) -> dict[str, Manifest]:
    """One manifest a split, with the same classes for all of them.

    Args:
        found: The parts, each in manifest order; parts of one split follow one another.
        root_url: `Manifest.root`.
        root: What to call it in messages.

    Raises:
        DataError: Labels are missing, out of range, of two kinds, or differ between splits.
    """
    by_split = {
        split: [p for p in found.parts if p.split == split] for split in ("train", "val", "test")
    }
    labels = {
        split: _in_normal_form([x for p in parts for x in p.labels])
        for split, parts in by_split.items()
    }
    for split, values in labels.items():
        if values and all(value is None for value in values):
            logger.warning(f"{root}: the split {split} has no labels; not used")
            labels[split] = []
        elif None in values:
            raise DataError(f"{root}: {values.count(None)} of {len(values)} samples of {split} "
                            "have no label")  # fmt: skip
    labels = {split: values for split, values in labels.items() if values}
    if not labels:
        raise DataError(f"{root}: no sample has a label")
    if found.class_folders:
        _check_same_classes(
            {split: set(map(str, values)) for split, values in labels.items()}, root
        )
    listed = None if found.class_names is None else check_class_names(found.class_names, root)
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

    It is not saved, so its files and members may have names that are not UTF-8 (as surrogates).
    """
    size = sum(len(part.offset) for part in found.parts)
    label = np.full(size, -1, dtype=np.int64)
    manifest = _manifest(found, found.parts, label, [], root_url)
    members = [name for part in found.parts for name in part.members or ()]
    return replace(
        manifest,
        members=members if len(members) == size else None,
        not_read=_not_read(found, root),
    )


def _in_normal_form(labels: list[Label]) -> list[Label]:
    """The labels with each name in composed form (NFC), so that one class has one spelling."""
    other = {x: normal_form(x) for x in set(labels) if isinstance(x, str) and not x.isascii()}
    if all(name == form for name, form in other.items()):
        return labels
    return [other.get(x, x) if isinstance(x, str) else x for x in labels]


def _not_read(found: Found, root: str) -> str:
    """What no reader takes, by suffix, or ""; a warning names it, and the ignored folders."""
    told = seen(found.not_read) if found.not_read else ""
    lines = [f"not read: {told}, such as {printable(found.not_read[0])}"] if told else []
    lines += [f"ignored: {some(found.ignored)}"] if found.ignored else []
    if lines:
        logger.warning(f"{root}: {'; '.join(lines)}")
    return told


def _manifest(
    found: Found,
    parts: list[Part],
    label: np.ndarray,
    class_names: list[str],
    root_url: str,
) -> Manifest:
    files = [file for part in parts for file in part.files]
    starts = np.cumsum([0, *(len(part.files) for part in parts)])
    joined: dict[str, Any] = {
        "file_index": [
            start + np.asarray(p.file_index) for start, p in zip(starts[:-1], parts, strict=True)
        ],
        "offset": [np.asarray(part.offset, dtype=np.int64) for part in parts],
        "length": [np.asarray(part.length, dtype=np.int64) for part in parts],
        "crc32": [
            np.full(len(part.offset), -1) if part.crc32 is None else np.asarray(part.crc32)
            for part in parts
        ],
    }
    columns: dict[str, Any] = {
        name: np.concatenate(arrays).astype(np.int64) for name, arrays in joined.items()
    }
    return Manifest(
        root=root_url,
        files=files,
        file_index=columns.pop("file_index").astype(np.int32),
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
        told = [f"{split} lacks {some(names)}" for split, names in missing.items() if names]
        if told:
            raise DataError(f"{root}: the class folders differ between splits: {'; '.join(told)}")


def _number_labels(
    labels: dict[str, list[Label]], class_names: list[str] | None, root: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    kinds = {type(value) for values in labels.values() for value in values}
    if kinds == {str}:
        names = {str(value) for values in labels.values() for value in values}
        if class_names is None:
            class_names = sorted(names)
        elif names - set(class_names):
            raise DataError(f"{root}: labels not in the list of classes: "
                            f"{some(names - set(class_names))}")  # fmt: skip
        number = {name: i for i, name in enumerate(class_names)}
        numbered = {s: np.array([number[str(v)] for v in values]) for s, values in labels.items()}
        return class_names, numbered
    if kinds != {int}:
        raise DataError(f"{root}: some labels are numbers and some are text")
    numbers = {int(value) for values in labels.values() for value in values if value is not None}
    if class_names is None:
        class_names = _names_of_numbers(numbers, root)
    if not 0 <= min(numbers) <= max(numbers) < len(class_names):
        split, wrong = next(
            (split, wrong)
            for split, values in labels.items()
            if (wrong := [x for x in values if not 0 <= int(x or 0) < len(class_names)])
        )
        raise DataError(
            f"{root}: {len(wrong)} labels of {split} are out of range, such as {wrong[0]}; "
            f"with {len(class_names)} classes they must be 0 to {len(class_names) - 1}"
        )
    return class_names, {s: np.array(values, dtype=np.int64) for s, values in labels.items()}


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
            f"{some(map(str, empty))}; labels count from 0"
        )
    return [str(i) for i in range(count)]


def some(names: Iterable[str]) -> str:
    """The first names of a set, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _LISTED
    return ", ".join(ordered[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
