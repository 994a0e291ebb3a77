"""Layouts: what a URL holds (folders, zip, tar, Parquet, CIFAR), and its samples as manifests."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

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
    files_by_kind,
    kind_of_file,
    largest_kind,
    may_be_packed,
)
from lightship.data.sources.file_names import count_by_suffix, is_image, list_some
from lightship.data.sources.listing import Listing, list_root
from lightship.data.sources.own_files import without_own
from lightship.data.sources.parquet import scan_parquet
from lightship.data.sources.parts import Found, Part
from lightship.data.sources.roots import resolve_root, warn_of_shadowed_folder
from lightship.data.sources.tar import scan_tars
from lightship.data.table_cache import Table
from lightship.errors import DataError
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
    paths = list(listing.sizes)
    if paths == [""]:
        return _find_in_file(url, root, listing.sizes[""], labelled)
    kinds = files_by_kind(paths)
    kind = _clear_kind(kinds, listing, root)
    chosen = kinds[kind]
    used = set(chosen)
    if kind == "CIFAR":
        check_cifar_size(sum(listing.sizes[path] for path in chosen), root)
        return scan_cifar(
            {path.rpartition("/")[2]: path for path in chosen},
            lambda path: storage.read_bytes(storage.join(url, path)),
            lambda path: (path, 0),
            root,
        )
    if kind == "image":
        found = _find_folders(listing, chosen, root, labelled)
    elif kind == "Parquet":
        found = scan_parquet(url, chosen, root, labelled)
    else:
        found = scan_tars(url, chosen, kind == "gzipped tar", root, labelled)
        used |= {path for path in paths if path.rpartition("/")[2] in CLASS_LISTS}
        found.class_names = found.class_names or read_class_list(url, paths, chosen[0], root)
    unread = (path for path in paths if path not in used)
    found.not_read += without_own(unread, listing.sizes, url) + listing.not_read
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


def _clear_kind(kinds: dict[Kind, list[str]], listing: Listing, root: str) -> Kind:
    """The kind of nearly all bytes of a listing."""
    sizes = listing.sizes
    if not kinds:
        ignored = f" (ignored: {list_some(listing.ignored)})" if listing.ignored else ""
        found = f"found {count_by_suffix(sizes)}{ignored}"
        raise DataError(f"--data.root {root}: {found}; looked for {LOOKED_FOR}")
    largest = largest_kind(kinds, sizes)
    total_bytes = {kind: sum(sizes[path] for path in files) for kind, files in kinds.items()}
    if total_bytes[largest] < _CLEAR_MAJORITY * sum(total_bytes.values()):
        held = " and ".join(f"{len(files)} {kind} files" for kind, files in kinds.items())
        raise DataError(f"--data.root {root} holds {held}; point it at one kind alone")
    return largest


def _find_folders(listing: Listing, images: list[str], root: str, labelled: bool) -> Found:
    def part(split: str, paths: list[str], labels: list[str] | list[None]) -> Part:
        crc32 = [listing.crc32[path] for path in paths] if listing.crc32 else None
        lengths = [listing.sizes[path] for path in paths]
        return Part(split, paths, range(len(paths)), [0] * len(paths), lengths, labels, crc32)

    if not labelled:
        return Found([part("train", images, [None] * len(images))])
    layout = read_class_folders(images, root)
    others = [path for path in listing.sizes if not is_image(path)]
    check_no_empty_class(layout, others, listing.folders_in, root)
    chosen: dict[str, tuple[list[str], list[str]]] = {
        split: ([], []) for split in layout.splits.values()
    }
    for path, pair in zip(images, layout.assigned, strict=True):
        if pair:
            paths, names = chosen[pair[0]]
            paths.append(path)
            names.append(pair[1])
    parts = [part(split, *columns) for split, columns in chosen.items()]
    return Found(parts, class_folders=True)
