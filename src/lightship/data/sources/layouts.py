"""Sources: what a URL holds (folders, zip, tar, Parquet, CIFAR), and its samples as manifests."""

import codecs
import importlib.resources
import json
import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial

from lightship import storage
from lightship.data.manifest import Manifest, load_manifests
from lightship.data.names import check_class_names
from lightship.data.shards.index import INDEX, load_index
from lightship.data.sources.cifar import cifar_files, scan_cifar
from lightship.data.sources.class_folders import check_no_empty_class, read_class_folders
from lightship.data.sources.listing import Listing, list_root
from lightship.data.sources.own_files import without_own
from lightship.data.sources.parquet import scan_parquet
from lightship.data.sources.parts import (
    Found,
    Part,
    build_manifests,
    build_unlabelled,
    is_image,
    seen,
    some,
    suffix,
)
from lightship.data.sources.tar import scan_tars
from lightship.errors import DataError
from lightship.storage.urls import split

logger = logging.getLogger(__name__)
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
NAMED_ROOTS = {
    "cifar10": (_CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": (_CIFAR + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}
"""Shorthands for (--data.root, --data.root_md5)."""
_LOOKED_FOR = (
    "class folders of images, WebDataset .tar shards, .parquet files or a CIFAR python archive"
)
_TARS, _GZIPPED_TARS, _PARQUET = (".tar",), (".tar.gz", ".tgz"), (".parquet",)
_CLASS_LISTS = ("classes.txt", "classes.json")
_CLEAR_MAJORITY = 0.9
_SIZE_THREADS = 16


def scan(
    root: str, root_md5: str | None = None, leave_out: Sequence[str] = ()
) -> dict[str, Manifest]:
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
        leave_out: URLs of files that the command itself writes, which may lie under the root.

    Raises:
        DataError: Nothing to train on; the message says what was found.
        ConfigError: Parquet without pyarrow.
    """
    url, told = resolve_root(root, root_md5), storage.redact(root)
    _warn_of_shadowed_folder(root)
    seen_there = _look(url, told, leave_out)
    if not isinstance(seen_there, Listing):
        return seen_there
    return build_manifests(_find(url, told, seen_there, labelled=True), url, told)


def scan_images(root: str, root_md5: str | None = None, leave_out: Sequence[str] = ()) -> Manifest:
    """Every image anywhere under a root, unlabelled (-1), sorted as in `scan`. Rank 0; blocks.

    The arguments are those of `scan`.

    Raises:
        DataError: There is no image; the message says what was found.
    """
    url, told = resolve_root(root, root_md5), storage.redact(root)
    _warn_of_shadowed_folder(root)
    seen_there = _look(url, told, leave_out)
    if isinstance(seen_there, Listing):
        return build_unlabelled(_find(url, told, seen_there, labelled=False), url, told)
    parts = [
        Part(split, m.files, m.file_index, m.offset, m.length, [None] * len(m), m.crc32)
        for split, m in sorted(seen_there.items())
    ]
    return build_unlabelled(Found(parts), url, told)


def _warn_of_shadowed_folder(root: str) -> None:
    if (root == "digits" or root in NAMED_ROOTS) and os.path.lexists(root):
        logger.warning(
            f"--data.root {root} is the data set of that name; for the local {root} give ./{root}"
        )


def resolve_root(root: str, root_md5: str | None = None) -> str:
    """The URL that a root's samples are read from: `Manifest.root` on this machine.

    A named root becomes its URL, one with an MD5 a verified local copy, a .zip its inside. Every
    rank that loads a saved manifest calls it, because a copy has another path on each machine.
    Blocks while fetching.

    Raises:
        DataError: There is no such file, or its MD5 differs.
    """
    if root == "digits":
        return _inside_zip(str(importlib.resources.files("lightship.data") / "digits.zip"))
    url, md5 = NAMED_ROOTS.get(root, (root, None))
    md5 = root_md5 or md5
    if md5:
        url = str(storage.cached_download(url, md5))
        with storage.open_binary(url) as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
    else:
        is_single = split(url)[2] is None
        is_zip = is_single and url.lower().endswith(".zip") and _is_file(url)
    return _inside_zip(url) if is_zip else url


def _inside_zip(url: str) -> str:
    is_plain = storage.is_remote(url) or "::" not in url
    return f"zip://::{url}" if is_plain else f"zip://::file://{storage.local_path(url).absolute()}"


def _is_file(url: str) -> bool:
    return storage.is_remote(url) or os.path.isfile(storage.local_path(url))


def _look(url: str, root: str, leave_out: Sequence[str]) -> Listing | dict[str, Manifest]:
    """What lies at a root, or if it holds packed shards, the splits that their index names."""
    if (packed := _find_on_web(url, root)) is not None:
        return packed
    load = None
    if storage.is_remote(url) and split(url)[2] is None:
        # Beside the listing, which tells whether it is there: a round trip less to wait for.
        load = storage.in_daemon(partial(load_manifests, storage.join(url, INDEX))).result
    listing = list_root(url, root, leave_out)
    if INDEX in listing.sizes:
        return load_index(url, f"--data.root {root}", lambda files: listing.sizes, load)
    return listing


def _find_on_web(url: str, root: str) -> dict[str, Manifest] | None:
    """The packed shards under a web address, where nothing can be listed; None if there are none.

    What looks like a file, by its suffix or a query, is not asked for an index; a slash at the end
    says that it is none.
    """
    looks_like_file = suffix(storage.base_name(url)) and not url.endswith("/")
    if not url.startswith(("http://", "https://")) or "?" in url or looks_like_file:
        return None

    def size_of(file: str) -> tuple[str, int] | None:
        try:
            return file, storage.size_bytes(storage.join(url, file))
        except (storage.NotFound, storage.Denied):
            return None

    def sizes_of(files: Iterable[str]) -> dict[str, int]:
        return dict(filter(None, storage.parallel_map(size_of, files, _SIZE_THREADS)))

    try:
        return load_index(url, f"--data.root {root}", sizes_of)
    except (storage.NotFound, storage.Denied):
        return None


def _find(url: str, root: str, listing: Listing, labelled: bool) -> Found:
    paths = list(listing.sizes)
    if paths == [""]:
        return _find_in_file(url, root, listing.sizes[""], labelled)
    if cifar := cifar_files(paths):
        return scan_cifar(
            cifar,
            lambda path: storage.read_bytes(storage.join(url, path)),
            lambda path: (path, 0),
            root,
        )
    kinds = {
        "image": [path for path in paths if is_image(path)],
        "tar": [path for path in paths if path.lower().endswith(_TARS)],
        "gzipped tar": [path for path in paths if path.lower().endswith(_GZIPPED_TARS)],
        "Parquet": [path for path in paths if path.lower().endswith(_PARQUET)],
    }
    kind = _largest_kind(kinds, listing, root)
    chosen = kinds[kind]
    used = set(chosen)
    if kind == "image":
        found = _find_folders(listing, chosen, root, labelled)
    elif kind == "Parquet":
        found = scan_parquet(url, chosen, root, labelled)
    else:
        found = scan_tars(url, chosen, kind == "gzipped tar", root, labelled)
        used |= {path for path in paths if path.rpartition("/")[2] in _CLASS_LISTS}
        found.class_names = found.class_names or _listed_classes(url, paths, chosen[0], root)
    unread = (path for path in paths if path not in used)
    found.not_read += without_own(unread, listing.sizes, url) + listing.not_read
    found.ignored += listing.ignored
    return found


def _find_in_file(url: str, root: str, size_bytes: int, labelled: bool) -> Found:
    """A root that is one file is known by its first bytes, whatever its name."""
    head = storage.read_range(url, 0, min(size_bytes, 512))
    if head.startswith(b"\x1f\x8b"):
        return scan_tars(url, [""], True, root, labelled)
    if head[257:262] == b"ustar" or url.lower().endswith(_TARS):
        return scan_tars(url, [""], False, root, labelled)
    if head.startswith(b"PAR1"):
        return scan_parquet(url, [""], root, labelled)
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"--data.root {root} is a zip; give it as zip://::{root}")
    if not labelled and is_image(storage.base_name(url)):
        return Found([Part("train", [""], [0], [0], [size_bytes], [None])])
    raise DataError(
        f"--data.root {root} is one file of {size_bytes} bytes and no tar, zip or Parquet; "
        f"looked for {_LOOKED_FOR}"
    )


def _largest_kind(kinds: dict[str, list[str]], listing: Listing, root: str) -> str:
    sizes = listing.sizes
    total = {kind: sum(sizes[path] for path in paths) for kind, paths in kinds.items() if paths}
    if not total:
        ignored = f" (ignored: {some(listing.ignored)})" if listing.ignored else ""
        raise DataError(
            f"--data.root {root}: found {seen(sizes)}{ignored}; looked for {_LOOKED_FOR}"
        )
    largest = max(total, key=lambda kind: total[kind])
    if total[largest] < _CLEAR_MAJORITY * sum(total.values()):
        held = " and ".join(f"{len(kinds[kind])} {kind} files" for kind in total)
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
    chosen: dict[str, list[tuple[str, str]]] = {split: [] for split in layout.splits.values()}
    for path, pair in zip(images, layout.assigned, strict=True):
        if pair:
            chosen[pair[0]].append((path, pair[1]))
    parts = [
        part(split, [path for path, _ in pairs], [name for _, name in pairs])
        for split, pairs in chosen.items()
    ]
    return Found(parts, class_folders=True)


def _listed_classes(url: str, paths: list[str], shard: str, root: str) -> list[str] | None:
    """The classes named by a file beside the shards or at the root: one a line, or a JSON list."""
    for folder in (shard.rpartition("/")[0], ""):
        for file in _CLASS_LISTS:
            path = f"{folder}/{file}".lstrip("/")
            if path not in paths:
                continue
            return _parse_classes(storage.read_bytes(storage.join(url, path)), path, root)
    return None


def _parse_classes(raw: bytes, path: str, root: str) -> list[str]:
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{root}: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    if suffix(path) == "json":
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{root}: {path} is not JSON: {error}") from error
        if not isinstance(names, list):
            raise DataError(f"{root}: {path} is not a list of class names")
        return check_class_names(names, f"{root}: {path}")
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names[:-1] or names == [""]:
        raise DataError(
            f"{root}: line {names.index('') + 1} of {path} is empty; each line names the class of "
            "one number, from 0, so remove the line or name the class"
        )
    return check_class_names(names, f"{root}: {path}")
