"""Layouts: what a URL holds (folders, zip, tar, Parquet, CIFAR), and its samples as manifests."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain

import numpy as np

from lightship import storage
from lightship.data.manifest import Manifest
from lightship.data.shards.index import INDEX, INDEX_0_1, index_in, load_index
from lightship.data.sources.build_manifests import build_manifests, build_unlabelled
from lightship.data.sources.cifar import check_cifar_size, scan_cifar
from lightship.data.sources.class_folders import check_no_empty_class, read_class_folders
from lightship.data.sources.class_lists import CLASS_LISTS, read_class_list
from lightship.data.sources.detect import (
    LOOKED_FOR,
    Kind,
    bytes_by_kind,
    files_by_kind,
    kind_of_file,
    may_be_packed,
)
from lightship.data.sources.file_names import count_by_suffix, list_some
from lightship.data.sources.listing import Listing, list_root
from lightship.data.sources.own_files import without_own
from lightship.data.sources.parquet import scan_parquet
from lightship.data.sources.parts import Found, Labels, Part
from lightship.data.sources.roots import resolve_root, warn_of_shadowed_folder
from lightship.data.sources.tar import scan_tars
from lightship.data.table_cache import Table
from lightship.errors import DataError
from lightship.storage.file_list import FileList
from lightship.storage.file_table import FileTable
from lightship.storage.urls import split

_CLEAR_MAJORITY = 0.9


def scan(root: str, root_md5: str | None = None) -> dict[str, Manifest]:
    """The labelled splits (train, val, test: those there are) at a root. Rank 0; blocks.

    Understood, by what one listing shows: class folders `{train,val,test}/CLASS/IMAGE` or
    `CLASS/IMAGE`, also in a .zip or .tar; WebDataset shards (labels from .cls or .json, else the
    folder; class names from classes.txt or classes.json beside them); Parquet; the CIFAR python
    archives, packed or unpacked. The order of samples follows from the content alone: paths
    sorted, members of labelled shards as they lie, rows as they come. The shards of `lightship
    pack` have an index, which is read instead, once its sizes are found to be those of the files.

    Args:
        root: `--data.root`: a URL, a path, or digits, cifar10, cifar100.
        root_md5: `--data.root_md5`: MD5 of the one file at `root`, which is fetched and kept.

    Raises:
        DataError: Nothing to train on; the message says what was found.
        ConfigError: Parquet without pyarrow.
    """
    url, shown = resolve_root(root, root_md5), storage.redact(root)
    warn_of_shadowed_folder(root)
    found = _look(url, shown)
    if not isinstance(found, Listing):
        return found
    parts = _find(url, shown, found, labelled=True)
    del found  # the names of all files once more
    return build_manifests(parts, url, shown)


def scan_images(root: str, root_md5: str | None = None, leave_out: Sequence[str] = ()) -> Manifest:
    """Every image anywhere under a root, unlabelled (-1), sorted as in `scan`. Rank 0; blocks.

    Args:
        root: As for `scan`.
        root_md5: Likewise.
        leave_out: URLs of files that the command itself writes, which may lie under the root.

    Raises:
        DataError: There is no image; the message says what was found.
    """
    url, shown = resolve_root(root, root_md5), storage.redact(root)
    warn_of_shadowed_folder(root)
    found = _look(url, shown, leave_out)
    if isinstance(found, Listing):
        return build_unlabelled(_find(url, shown, found, labelled=False), url, shown)
    parts = [
        Part(split, list(m.files), m.file_index, m.offset, m.length, [None] * len(m), m.crc32)
        for split, m in sorted(found.items())
    ]
    return build_unlabelled(Found(parts), url, shown)


def _look(url: str, root: str, leave_out: Sequence[str] = ()) -> Listing | dict[str, Manifest]:
    """What lies at a root, or if it holds packed shards, the splits that their index names."""
    if (packed := _find_on_web(url, root)) is not None:
        return packed
    find = None
    if storage.is_remote(url) and split(url)[2] is None:
        # Beside the listing, which tells whether it is there: a round trip less to wait for.
        find = storage.in_daemon(partial(Table.at, storage.join(url, INDEX))).result
    listing = list_root(url, root, leave_out)
    if name := index_in(listing.sizes):
        return load_index(url, name, f"--data.root {root}", listing.sizes, find)
    return listing


def _find_on_web(url: str, root: str) -> dict[str, Manifest] | None:
    """The packed shards under a web address; None if there are none."""
    if not may_be_packed(url):
        return None
    for name in (INDEX, INDEX_0_1):
        with suppress(storage.NotFound, storage.Denied):
            return load_index(url, name, f"--data.root {root}", None)
    return None


def _find(url: str, root: str, listing: Listing, labelled: bool) -> Found:
    files = listing.sizes
    if len(files) == 1 and "" in files:
        return _find_in_file(url, root, files[""], labelled)
    kinds = files_by_kind(files)
    kind = _clear_kind(kinds, listing, root)
    is_used = kinds[kind]
    chosen, others = files.select(is_used), files.select(~is_used)
    if kind == "CIFAR":
        check_cifar_size(int(chosen.sizes.sum()), root)
        return scan_cifar(
            {path.rpartition("/")[2]: path for path in chosen},
            lambda path: storage.read_bytes(storage.join(url, path)),
            lambda path: (path, 0),
            root,
        )
    if kind == "image":
        found = _find_folders(listing, chosen, others, root, labelled)
    elif kind == "Parquet":
        found = scan_parquet(url, list(chosen), root, labelled)
    else:
        shards = list(chosen)
        found = scan_tars(url, shards, kind == "gzipped tar", root, labelled)
        found.class_names = found.class_names or read_class_list(url, files, shards[0], root)
        others = others.select(others.mask(lambda path: path.rpartition("/")[2] not in CLASS_LISTS))
    unread = without_own(others, files, url)
    found.not_read = FileList.of(chain(found.not_read, unread, listing.not_read))
    found.ignored += listing.ignored
    return found


def _find_in_file(url: str, root: str, size_bytes: int, labelled: bool) -> Found:
    kind = kind_of_file(url, size_bytes, root)
    if kind == "image":
        if labelled:
            raise DataError(f"--data.root {root} is one image; looked for {LOOKED_FOR}")
        return Found([Part("train", [""], [0], [0], [size_bytes], [None])])
    if kind == "Parquet":
        return scan_parquet(url, [""], root, labelled)
    return scan_tars(url, [""], kind == "gzipped tar", root, labelled)


def _clear_kind(kinds: dict[Kind, np.ndarray], listing: Listing, root: str) -> Kind:
    """The kind of nearly all bytes of a listing."""
    sizes = listing.sizes
    if not kinds:
        ignored = f" (ignored: {list_some(listing.ignored)})" if listing.ignored else ""
        found = f"found {count_by_suffix(sizes)}{ignored}"
        raise DataError(f"--data.root {root}: {found}; looked for {LOOKED_FOR}")
    total_bytes = bytes_by_kind(kinds, sizes)
    largest = max(total_bytes, key=total_bytes.__getitem__)
    if total_bytes[largest] < _CLEAR_MAJORITY * sum(total_bytes.values()):
        held = " and ".join(f"{mask.sum()} {kind} files" for kind, mask in kinds.items())
        raise DataError(f"--data.root {root} holds {held}; point it at one kind alone")
    return largest


def _find_folders(
    listing: Listing, images: FileTable, others: FileTable, root: str, labelled: bool
) -> Found:
    def part(name: str, files: FileTable, labels: Labels) -> Part:
        crc32 = [listing.crc32[path] for path in files] if listing.crc32 else None
        numbers = np.arange(len(files), dtype=np.int32)
        zeros = np.broadcast_to(np.int64(0), len(files))
        return Part(name, files.paths, numbers, zeros, files.sizes, labels, crc32)

    if not labelled:
        return Found([part("train", images, Labels([None], np.zeros(len(images), np.int32)))])
    layout = read_class_folders(images.paths, root)
    check_no_empty_class(layout, others, listing.folders_in, root)
    parts = []
    for name in dict.fromkeys(layout.splits.values()):
        is_image, labels = layout.images_of(name)
        parts.append(part(name, images.select(is_image), labels))
    return Found(parts, class_folders=True)
