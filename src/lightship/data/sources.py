"""Sources: what a URL holds (folders, zip, tar, Parquet, CIFAR), and its samples as manifests."""

import importlib.resources
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from lightship import storage
from lightship.data.manifest import Manifest, load_manifests
from lightship.data.shards import INDEX, UNFINISHED, WORK, load_index
from lightship.data.sources_cifar import cifar_files, scan_cifar
from lightship.data.sources_folders import check_no_empty_class, read_class_folders
from lightship.data.sources_parquet import scan_parquet
from lightship.data.sources_parts import (
    Found,
    Part,
    build_manifests,
    build_unlabelled,
    is_ignored,
    is_image,
    seen,
    suffix,
)
from lightship.data.sources_tar import scan_tars
from lightship.exits import DataError

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


@dataclass
class _Listing:
    """The files under a root, without the ignored ones, and its folders where they are known."""

    sizes: dict[str, int]
    """Path -> bytes, sorted by path; the path "" is the root itself."""
    crc32: dict[str, int]
    folders_in: Callable[[str], Iterable[str]]


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
    url, told = resolve_root(root, root_md5), storage.redact(root)
    seen_there = _look(url, told)
    if not isinstance(seen_there, _Listing):
        return seen_there
    return build_manifests(_find(url, told, seen_there, labelled=True), url, told)


def scan_images(root: str, root_md5: str | None = None) -> Manifest:
    """Every image anywhere under a root, unlabelled (-1), sorted as in `scan`. Rank 0; blocks.

    Raises:
        DataError: There is no image; the message says what was found.
    """
    url, told = resolve_root(root, root_md5), storage.redact(root)
    seen_there = _look(url, told)
    if isinstance(seen_there, _Listing):
        return build_unlabelled(_find(url, told, seen_there, labelled=False), url, told)
    parts = [
        Part(split, m.files, m.file_index, m.offset, m.length, [None] * len(m), m.crc32)
        for split, m in sorted(seen_there.items())
    ]
    return build_unlabelled(Found(parts), url, told)


def resolve_root(root: str, root_md5: str | None = None) -> str:
    """The URL that a root's samples are read from: `Manifest.root` on this machine.

    A named root becomes its URL, one with an MD5 a verified local copy, a .zip its inside. Every
    rank that loads a saved manifest calls it, because a copy has another path on each machine.
    Blocks while fetching.

    Raises:
        DataError: There is no such file, or its MD5 differs.
    """
    if root == "digits":
        return f"zip://::{importlib.resources.files('lightship.data') / 'digits.zip'}"
    url, md5 = NAMED_ROOTS.get(root, (root, None))
    md5 = root_md5 or md5
    if md5:
        url = str(storage.cached_download(url, md5))
        with storage.open_binary(url) as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
    else:
        is_zip = "::" not in url and url.lower().endswith(".zip") and _is_file(url)
    return f"zip://::{url}" if is_zip else url


def _is_file(url: str) -> bool:
    return storage.is_remote(url) or storage.local_path(url).is_file()


def _look(url: str, root: str) -> _Listing | dict[str, Manifest]:
    """What lies at a root, or if it holds packed shards, the splits that their index names."""
    if (packed := _find_on_web(url, root)) is not None:
        return packed
    with ThreadPoolExecutor(1) as pool:
        load = None
        if storage.is_remote(url) and "::" not in url:
            # Beside the listing, which tells whether it is there: a round trip less to wait for.
            load = pool.submit(load_manifests, storage.join(url, INDEX)).result
        listing = _list_zip(url) if url.startswith("zip://") else _list(url, root)
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
        with ThreadPoolExecutor(_SIZE_THREADS) as pool:
            return dict(filter(None, pool.map(size_of, files)))

    try:
        return load_index(url, f"--data.root {root}", sizes_of)
    except (storage.NotFound, storage.Denied):
        return None


def _find(url: str, root: str, listing: _Listing, labelled: bool) -> Found:
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
    kind = _largest_kind(kinds, listing.sizes, root)
    chosen = kinds[kind]
    if kind == "image":
        return _find_folders(listing, chosen, root, labelled)
    if kind == "Parquet":
        return scan_parquet(url, chosen, root, labelled)
    found = scan_tars(url, chosen, kind == "gzipped tar", root, labelled)
    found.class_names = found.class_names or _listed_classes(url, paths, chosen[0])
    return found


def nothing_there(url: str) -> DataError:
    """What to say of a root with no file in it."""
    if storage.is_remote(url):
        why = "no object's name begins so"
    elif storage.local_path(url).exists():
        why = "the folder holds no file"
    else:
        why = f"no such folder or file (seen from {os.getcwd()})"
    return DataError(f"--data.root {storage.redact(url)}: nothing is there: {why}")


def _list(url: str, root: str) -> _Listing:
    try:
        files = storage.list_files(url)
    except storage.NotFound as error:
        raise nothing_there(url) from error

    def folders_in(folder: str) -> Iterable[str]:
        if storage.is_remote(url):  # object stores have no empty folders
            return []
        here = storage.local_path(url) / folder
        return [path.name for path in here.iterdir() if path.is_dir()]

    paths = {file.path for file in files}
    if UNFINISHED in paths and INDEX not in paths:
        raise DataError(
            f"--data.root {root} is not packed to the end: run the same lightship pack again, "
            f"which goes on where it stopped, or remove {WORK}/ to take the shards that are there"
        )
    kept = sorted((f.path, f.size_bytes) for f in files if f.path == "" or not is_ignored(f.path))
    return _Listing(dict(kept), {}, folders_in)


def _list_zip(url: str) -> _Listing:
    """As `_list`, from the zip's directory alone, which also knows checksums."""
    inside, _, archive_url = url.removeprefix("zip://").partition("::")
    prefix = f"{inside.strip('/')}/" if inside.strip("/") else ""
    root = storage.redact(archive_url)
    try:
        with storage.open_binary(archive_url) as stream, zipfile.ZipFile(stream) as archive:
            entries = [e for e in archive.infolist() if e.filename.startswith(prefix)]
    except zipfile.BadZipFile as error:
        raise DataError(f"{root} is not a whole zip: {error}") from error
    except storage.NotFound as error:
        raise nothing_there(archive_url) from error
    files, folders = {}, []
    for entry in sorted(entries, key=lambda entry: entry.filename):
        path = entry.filename.removeprefix(prefix)
        if entry.is_dir():
            folders.append(PurePosixPath(path))
        elif not is_ignored(path):
            files[path] = entry
    return _Listing(
        {path: entry.file_size for path, entry in files.items()},
        {path: entry.CRC for path, entry in files.items()},
        lambda holder: [f.name for f in folders if f.parent == PurePosixPath(holder)],
    )


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


def _largest_kind(kinds: dict[str, list[str]], sizes: dict[str, int], root: str) -> str:
    total = {kind: sum(sizes[path] for path in paths) for kind, paths in kinds.items() if paths}
    if not total:
        raise DataError(f"--data.root {root}: found {seen(sizes)}; looked for {_LOOKED_FOR}")
    largest = max(total, key=lambda kind: total[kind])
    if total[largest] < _CLEAR_MAJORITY * sum(total.values()):
        held = " and ".join(f"{len(kinds[kind])} {kind} files" for kind in total)
        raise DataError(f"--data.root {root} holds {held}; point it at one kind alone")
    return largest


def _find_folders(listing: _Listing, images: list[str], root: str, labelled: bool) -> Found:
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


def _listed_classes(url: str, paths: list[str], shard: str) -> list[str] | None:
    """The classes named by a file beside the shards or at the root: one a line, or a JSON list."""
    for folder in (shard.rpartition("/")[0], ""):
        for file in _CLASS_LISTS:
            path = f"{folder}/{file}".lstrip("/")
            if path not in paths:
                continue
            text = storage.read_bytes(storage.join(url, path)).decode("utf-8", "replace")
            try:
                names = json.loads(text) if suffix(path) == "json" else text.splitlines()
            except ValueError as error:
                raise DataError(f"{path} is not JSON: {error}") from error
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"{path} is not a list of class names")
            return [name.strip() for name in names if name.strip()]
    return None
