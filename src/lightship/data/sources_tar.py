"""Tar files: WebDataset shards, class folders in a tar, a CIFAR archive; plain or gzipped."""

import gzip
import json
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lightship import storage
from lightship.data.sources_cifar import cifar_files, scan_cifar
from lightship.data.sources_folders import check_no_empty_class, read_class_folders
from lightship.data.sources_parts import (
    Found,
    Label,
    Part,
    is_ignored,
    is_image,
    suffix,
)
from lightship.data.sources_splits import splits_of_files
from lightship.exits import DataError

_SCAN_THREADS = 8


@dataclass
class _Shard:
    """The members of one tar: where their bytes lie, and those of the small ones."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path -> (offset, length), in the order of the tar."""
    folders: list[str] = field(default_factory=list)
    bytes_of: dict[str, bytes] = field(default_factory=dict)


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

    def scan_one(file: str) -> _Shard:
        url = storage.join(root_url, file) if file else root_url
        return _read_members(url, gzipped, file or root)

    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        shards = list(pool.map(scan_one, files))
    found = _find(files, shards, root, labelled)
    found.container = "gzip" if gzipped else "bytes"
    return found


def _read_members(url: str, gzipped: bool, name: str) -> _Shard:
    shard = _Shard()
    try:
        with storage.open_binary(url) as stream:
            plain: Any = gzip.GzipFile(fileobj=stream) if gzipped else stream
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    path = member.name.removeprefix("./")
                    if member.isdir():
                        shard.folders.append(path)
                    elif member.isfile() and not is_ignored(path):
                        if member.issparse():
                            raise DataError(f"{name}: {path} is stored sparse; repack the tar")
                        shard.places[path] = (member.offset_data, member.size)
                        if suffix(path) in ("cls", "json") or _may_be_cifar(path):
                            content = tar.extractfile(member)
                            assert content is not None
                            shard.bytes_of[path] = content.read()
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if gzipped:
                while plain.read(2**20):  # to the end, where the checksum is
                    pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a whole tar: {error}") from error
    return shard


def _may_be_cifar(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith("data_batch_") or name in (
        "test_batch", "batches.meta", "train", "test", "meta")  # fmt: skip


def _find(files: Sequence[str], shards: list[_Shard], root: str, labelled: bool) -> Found:
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
    labels = [_labels_of_keys(shard) for shard in shards]
    if any(labels):
        return _find_webdataset(files, shards, images, labels, splits, root)
    return _find_class_folders(files, shards, images, splits, root)


def _key(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _labels_of_keys(shard: _Shard) -> dict[str, Label]:
    labels: dict[str, Label] = {}
    for path, raw in shard.bytes_of.items():
        if suffix(path) == "json":
            label = _json_label(raw, path)
        elif suffix(path) == "cls":
            label = raw.decode("utf-8", "replace").strip()
        else:
            continue
        if isinstance(label, str) and label.removeprefix("-").isdecimal():
            label = int(label)
        if label is not None:
            labels.setdefault(_key(path), label)
    return labels


def _json_label(raw: bytes, path: str) -> Label:
    try:
        table = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path} in the tar is not JSON: {error}") from error
    label = table.get("label", table.get("cls")) if isinstance(table, dict) else None
    if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
        raise DataError(f"{path} in the tar: the label {label!r} is neither a number nor text")
    return label


def _find_webdataset(
    files: Sequence[str],
    shards: list[_Shard],
    images: list[list[str]],
    labels: list[dict[str, Label]],
    splits: list[str] | None,
    root: str,
) -> Found:
    parts = []
    for i, (shard, paths, label_of) in enumerate(zip(shards, images, labels, strict=True)):
        keys = [_key(path) for path in paths]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{root}: {files[i]} has two images of the sample {twice}")
        unlabelled = [key for key in keys if key not in label_of]
        if unlabelled:
            raise DataError(f"{root}: {files[i]} has no label for the sample {unlabelled[0]}")
        split = splits[i] if splits else "train"
        parts.append(_part(split, files[i], shard, paths, [label_of[key] for key in keys]))
    return Found(parts)


def _find_class_folders(
    files: Sequence[str],
    shards: list[_Shard],
    images: list[list[str]],
    splits: list[str] | None,
    root: str,
) -> Found:
    if splits:
        parts = []
        for i, paths in enumerate(map(sorted, images)):
            if not all("/" in path for path in paths):
                raise DataError(f"{root}: {files[i]} has images without a label or a class folder")
            names: list[Label] = [path.split("/")[-2] for path in paths]
            parts.append(_part(splits[i], files[i], shards[i], paths, names))
        return Found(parts)
    layout = read_class_folders([path for paths in images for path in paths], root)
    folders = [folder.rstrip("/") for shard in shards for folder in shard.folders]
    others = [path for shard in shards for path in shard.places if not is_image(path)]
    check_no_empty_class(
        layout,
        others,
        lambda holder: [f.rpartition("/")[2] for f in folders if f.rpartition("/")[0] == holder],
        root,
    )
    pairs = iter(layout.assigned)
    pair_of = [dict(zip(paths, pairs)) for paths in images]  # noqa: B905 (pairs spans all shards)
    parts = []
    for split in layout.splits.values():
        for i, shard in enumerate(shards):
            chosen = sorted(p for p, pair in pair_of[i].items() if pair and pair[0] == split)
            names = [pair[1] for p in chosen if (pair := pair_of[i][p])]
            parts.append(_part(split, files[i], shard, chosen, names))
    return Found(parts, class_folders=True)


def _part(
    split: str, file: str, shard: _Shard, paths: Sequence[str], labels: Sequence[Label]
) -> Part:
    places = [shard.places[path] for path in paths]
    offsets, lengths = [place[0] for place in places], [place[1] for place in places]
    return Part(split, [file], [0] * len(places), offsets, lengths, labels, members=paths)
