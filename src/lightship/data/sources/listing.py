"""The listing of a root: files that may be samples, without system folders and outputs of runs."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from lightship import storage
from lightship.data.names import printable
from lightship.data.shards.index import UNFINISHED, WORK, index_in
from lightship.data.sources.file_names import is_ignored, system_folder
from lightship.data.sources.own_files import folders_without_images, is_of_run, run_folders
from lightship.errors import DataError
from lightship.storage.file_table import FileTable
from lightship.storage.urls import relative_to, split, stays_below
from lightship.storage.zip_file import ZipFile


@dataclass
class Listing:
    """The files under a root, without the ignored ones, and its folders where they are known."""

    sizes: FileTable
    """Path -> bytes, sorted by path; the path "" is the root itself."""
    crc32: dict[str, int]
    folders_in: Callable[[str], Iterable[str]]
    not_read: list[str] = field(default_factory=list)
    """Paths of pipes, sockets and devices, and names that begin or end with a slash."""
    ignored: list[str] = field(default_factory=list)
    """Folders of the system and of runs, with what they are."""


def nothing_there(url: str) -> DataError:
    """What to say of a root with no file in it."""
    if storage.is_remote(url):
        why = "no object's name begins so"
    elif os.path.exists(storage.local_path(url)):
        why = "the folder holds no file"
    else:
        why = f"no such folder or file (seen from {os.getcwd()})"
    return DataError(f"--data.root {storage.redact(url)}: nothing is there: {why}")


def list_root(url: str, root: str, leave_out: Sequence[str] = ()) -> Listing:
    """List a root on any storage, or the inside of a zip. Rank 0; blocks.

    Args:
        url: The root.
        root: What to call it in messages.
        leave_out: URLs of files that the command writes, which may lie under the root.

    Raises:
        DataError: Nothing is there, a damaged zip, or shards of an unfinished pack.
    """
    protocol, head, archive_url = split(url)
    if protocol == "zip" and archive_url is not None:
        found = _list_zip(head.removeprefix("zip://"), archive_url)
    else:
        found = _list(url)
    if UNFINISHED in found.sizes and not index_in(found.sizes):
        raise DataError(
            f"--data.root {root} is an unfinished pack: rerun lightship pack to continue it, or "
            f"remove {WORK}/ to use the shards that exist"
        )
    if (slashed := found.sizes.mask(_has_slash_at_end)).any():
        if slashed.all():
            name = printable(next(iter(found.sizes)))
            raise DataError(
                f"--data.root {root}: all names begin or end with a slash ({name}) and would be "
                "read as others; rename the files"
            )
        found.not_read += (path for path in found.sizes.select(slashed) if not is_ignored(path))
        found.sizes = found.sizes.select(~slashed)
    strange = next((path for path in found.sizes if not stays_below(url, path)), None)
    if strange is not None:
        raise DataError(
            f"--data.root {root}: the name {printable(strange)} would be read as another URL; "
            "rename the file"
        )
    own = {path for each in leave_out if (path := relative_to(each, url))}
    runs = run_folders(found.sizes)
    found.ignored += [
        f"{run}/ (output of a run)" if run else "the output of a run at the root"
        for run in sorted(runs)
    ]

    def is_left_out(path: str) -> bool:
        return path != "" and (is_ignored(path) or path in own or is_of_run(path, runs))

    found.sizes = found.sizes.select(~found.sizes.mask(is_left_out))
    without_images, folders_in = folders_without_images(runs), found.folders_in
    found.folders_in = lambda folder: [
        name for name in folders_in(folder) if f"{folder}/{name}".lstrip("/") not in without_images
    ]
    return found


def _has_slash_at_end(path: str) -> bool:
    """Whether an object's name would be read as another one (see `stays_below`)."""
    return path.startswith("/") or path.endswith("/")


def _list(url: str) -> Listing:
    passed: set[str] = set()

    def passes(folder: str) -> bool:
        if system_folder(folder):
            passed.add(folder)
        return is_ignored(folder) and folder != WORK

    try:
        files = storage.list_table(url, skip=passes)
    except storage.NotFound as error:
        raise nothing_there(url) from error

    def folders_in(folder: str) -> Iterable[str]:
        if storage.is_remote(url):  # object stores have no empty folders
            return []
        here = storage.local_path(url) / folder
        return [path.name for path in here.iterdir() if path.is_dir()]

    passed |= {folder for path in chain(files, files.special) if (folder := system_folder(path))}
    return Listing(
        files,
        {},
        folders_in,
        [path for path in files.special if not is_ignored(path)],
        [f"{folder}/" for folder in sorted(passed)],
    )


def _list_zip(inside: str, archive_url: str) -> Listing:
    """As `_list`, from the zip's directory alone, which also knows checksums."""
    prefix = f"{inside.strip('/')}/" if inside.strip("/") else ""
    try:
        with storage.open_binary(archive_url) as stream:
            archive = ZipFile(stream, storage.redact(archive_url))
    except storage.NotFound as error:
        raise nothing_there(archive_url) from error
    passed, files, in_folder = set(), {}, dict[str, list[str]]()
    for path, entry in sorted(archive.entries.items()):
        if not path.startswith(prefix):
            continue
        path = path.removeprefix(prefix)
        if folder := system_folder(path):
            passed.add(f"{folder}/")
        if not is_ignored(path):
            files[path] = entry
    for path in archive.folders:
        if path.startswith(prefix):
            holder, _, name = path.removeprefix(prefix).rpartition("/")
            in_folder.setdefault(holder, []).append(name)
    return Listing(
        FileTable.of({path: entry.file_size for path, entry in files.items()}),
        {path: entry.CRC for path, entry in files.items()},
        lambda holder: in_folder.get(holder, []),
        ignored=sorted(passed),
    )
