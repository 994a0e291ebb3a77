"""Tar files: WebDataset shards, class folders in a tar, a CIFAR archive; plain or gzipped."""

import logging
from collections import Counter
from collections.abc import Sequence

from lightship import storage
from lightship.data.names import check_file_names, printable
from lightship.data.sources.cifar import cifar_files, scan_cifar
from lightship.data.sources.class_folders import (
    ClassFolders,
    check_no_empty_class,
    read_class_folders,
)
from lightship.data.sources.file_names import is_image, list_some, suffix
from lightship.data.sources.parts import Found, Label, Part
from lightship.data.sources.split_names import SPLITS, split_of_name, splits_of_files
from lightship.data.sources.tar_labels import is_label
from lightship.data.sources.tar_members import TarMembers, read_members
from lightship.errors import DataError

logger = logging.getLogger(__name__)
_SCAN_THREADS = 8
_Tar = tuple[str, TarMembers, list[str]]
"""A file, what it holds, and which of that are images."""


def scan_tars(
    root_url: str, files: Sequence[str], gzipped: bool, root: str, labelled: bool = True
) -> Found:
    """Scan every shard once; see `sources.scan` for what is understood. Rank 0; blocks.

    Args:
        root_url: What `files` are relative to.
        files: The shards, sorted; "" is the root itself.
        gzipped: Whether they are gzipped.
        root: What to call the root.
        labelled: False: every image, labels unread.

    Raises:
        DataError: A damaged tar, no image, or labels that are missing or do not fit.
    """

    def scan_one(file: str) -> TarMembers:
        url = storage.join(root_url, file) if file else root_url
        return read_members(url, gzipped, file or root, labelled)

    shards = storage.parallel_map(scan_one, files, _SCAN_THREADS)
    _warn_of_unreadable(files, shards, root)
    found = _find(files, shards, root, labelled)
    if found.encoding == "image":
        found.not_read = [
            f"{file}/{path}" if file else path
            for file, shard in zip(files, shards, strict=True)
            for path in shard.places
            if not is_image(path) and not is_label(path)
        ]
    found.container = "gzip" if gzipped else "bytes"
    return found


def _warn_of_unreadable(files: Sequence[str], shards: list[TarMembers], root: str) -> None:
    why = Counter(why for shard in shards for why in shard.unreadable.values())
    if why:
        first, shard = next(pair for pair in zip(files, shards, strict=True) if pair[1].unreadable)
        path, reason = next(iter(shard.unreadable.items()))
        logger.warning(
            f"{root}: {why.total()} images in the tars cannot be read, such as "
            f"{f'{first}: ' if first else ''}{printable(path)} ({reason})"
        )


def _find(files: Sequence[str], shards: list[TarMembers], root: str, labelled: bool) -> Found:
    if len(shards) == 1 and (cifar := cifar_files(list(shards[0].bytes_of))):
        only = shards[0]
        read, offset = only.bytes_of.__getitem__, lambda path: (files[0], only.places[path][0])
        return scan_cifar(cifar, read, offset, root)
    images = [[path for path in shard.places if is_image(path)] for shard in shards]
    if not any(images):
        members = [path for shard in shards for path in shard.places]
        raise DataError(
            f"{root}: no images in the tar; found {', '.join(members[:5]) or 'nothing'}"
        )
    if not labelled:
        none: list[Label] = [None]
        return Found([
            _part("train", files[i], shard, paths, none * len(paths))
            for i, (shard, paths) in enumerate(zip(shards, images, strict=True))
        ])  # fmt: skip
    splits = splits_of_files(files, root)
    labels = list(map(_labels_of_keys, shards))
    if any(labels):
        return _find_webdataset(files, shards, images, labels, splits, root)
    return _find_class_folders(files, shards, images, splits, root)


def _key(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _labels_of_keys(shard: TarMembers) -> dict[str, Label]:
    """Sample -> its label, of its .cls or else of its .json."""
    labels: dict[str, Label] = {}
    for path, label in shard.labels.items():
        if suffix(path) == "cls" or _key(path) not in labels:
            labels[_key(path)] = label
    return labels


def _find_webdataset(
    files: Sequence[str],
    shards: list[TarMembers],
    images: list[list[str]],
    labels: list[dict[str, Label]],
    splits: list[str] | None,
    root: str,
) -> Found:
    parts, without = [], list[str]()
    for i, (shard, paths, label_of) in enumerate(zip(shards, images, labels, strict=True)):
        keys = [_key(path) for path in paths]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{root}: {files[i]} has two images of the sample {printable(twice)}")
        unlabelled = [key for key in keys if key not in label_of]
        if unlabelled:
            sample = printable(unlabelled[0])
            raise DataError(f"{root}: {files[i]} has no label for the sample {sample}")
        without += sorted(label_of.keys() - keys)
        split = splits[i] if splits else "train"
        parts.append(_part(split, files[i], shard, paths, [label_of[key] for key in keys]))
    if without:
        logger.warning(
            f"{root}: {len(without)} samples have a label and no image and are not used, such as "
            f"{printable(without[0])}"
        )
    return Found(parts)


def _find_class_folders(
    files: Sequence[str],
    shards: list[TarMembers],
    images: list[list[str]],
    splits: list[str] | None,
    root: str,
) -> Found:
    """Class folders as if the tars were unpacked: all into one folder, or those of each split."""
    check_file_names(sorted({path.rpartition("/")[0] for paths in images for path in paths}), root)
    tars = list(zip(files, shards, images, strict=True))
    if splits is None:
        return Found(_parts_of_class_folders(tars, None, root), class_folders=True)
    parts: list[Part] = []
    for split in dict.fromkeys(splits):
        chosen = [tar for tar, named in zip(tars, splits, strict=True) if named == split]
        if any(paths for _, _, paths in chosen):
            parts += _parts_of_class_folders(chosen, split, root)
    return Found(parts, class_folders=True)


def _parts_of_class_folders(tars: Sequence[_Tar], split: str | None, root: str) -> list[Part]:
    """The parts of tars that hold one set together.

    Args:
        tars: (file, what it holds, its images) of each.
        split: The split that their names give to all of them, if they do.
        root: What to call the root.
    """
    tops = [_own_folder(file, paths) if split else "" for file, _, paths in tars]
    if split:
        root = f"{root}: {list_some(file for file, _, _ in tars)}"
    inside = [
        p.removeprefix(top) for top, (_, _, paths) in zip(tops, tars, strict=True) for p in paths
    ]
    layout = read_class_folders(inside, root, split or "train")
    if split:
        _check_split(layout, split, root)
    folders, others = [], []
    for top, (_, shard, _) in zip(tops, tars, strict=True):
        folders += [f"{folder}/".removeprefix(top).rstrip("/") for folder in shard.folders]
        others += [path.removeprefix(top) for path in shard.places if not is_image(path)]
    check_no_empty_class(
        layout,
        others,
        lambda holder: [f.rpartition("/")[2] for f in folders if f.rpartition("/")[0] == holder],
        root,
    )
    pairs = iter(layout.assigned)
    pair_of = [dict(zip(paths, pairs)) for _, _, paths in tars]  # noqa: B905 (pairs spans all)
    parts = []
    for one in layout.splits.values():
        for i, (file, shard, _) in enumerate(tars):
            chosen = sorted(p for p, pair in pair_of[i].items() if pair and pair[0] == one)
            names = [pair[1] for p in chosen if (pair := pair_of[i][p])]
            parts.append(_part(one, file, shard, chosen, names))
    return parts


def _own_folder(file: str, paths: Sequence[str]) -> str:
    """`train-0/` for train-0.tar if all its images lie there: a part of a split, not a class."""
    name = file.rpartition("/")[2].partition(".")[0]
    is_part = name.lower() not in SPLITS and split_of_name(name) is not None
    return f"{name}/" if is_part and all(path.startswith(f"{name}/") for path in paths) else ""


def _check_split(layout: ClassFolders, split: str, root: str) -> None:
    """Raise DataError for a folder that is another split than the names of its tars say."""
    for folder, inner in layout.splits.items():
        if inner != split:
            raise DataError(
                f"{root}: the name says {split}, but the folder {folder}/ inside is {inner}: make "
                "a tar of each split, or if one tar holds all, give it alone as --data.root"
            )


def _part(
    split: str, file: str, shard: TarMembers, paths: Sequence[str], labels: Sequence[Label]
) -> Part:
    places = [shard.places[path] for path in paths]
    offsets, lengths = [place[0] for place in places], [place[1] for place in places]
    return Part(split, [file], [0] * len(places), offsets, lengths, labels, members=paths)
