"""What the names of files tell: images, files to ignore, and many names in a few words."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

IMAGE_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "tif", "tiff", "bmp"}
IMAGE_SUFFIXES |= {"ppm", "pgm", "pbm", "pnm"}
_SYSTEM_FOLDERS = {
    "__macosx", "lost+found", "$recycle.bin", "recycler", "system volume information", "@eadir",
    "@recycle", "#recycle", "#snapshot", "@snapshot",
}  # fmt: skip
_MAX_NAMED = 5


def suffix(path: str) -> str:
    """The lower-case extension of a path without its dot, "" without one."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image(path: str) -> bool:
    """Whether the extension is that of an image."""
    return suffix(path) in IMAGE_SUFFIXES


def is_ignored(path: str) -> bool:
    """Hidden files, and what systems and archivers leave behind."""
    folder, _, name = path.rpartition("/")
    return (
        _is_hidden(name)
        or (folder != "" and _has_hidden(folder))
        or system_folder(path) is not None
        or name.lower() in ("thumbs.db", "desktop.ini", "")
    )


def system_folder(path: str) -> str | None:
    """The folder in a path that is a system's own, such as lost+found; None without one."""
    folder, _, name = path.rpartition("/")
    above = _system_folder_above(folder) if folder else None
    return above or (path if name.lower() in _SYSTEM_FOLDERS else None)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != "."


# Listings are sorted, so that neighbours lie in one folder.
@lru_cache
def _has_hidden(folder: str) -> bool:
    return any(map(_is_hidden, folder.split("/")))


@lru_cache
def _system_folder_above(folder: str) -> str | None:
    parts = folder.split("/")
    for depth, part in enumerate(parts):
        if part.lower() in _SYSTEM_FOLDERS:
            return "/".join(parts[: depth + 1])
    return None


def count_by_suffix(paths: Iterable[str]) -> str:
    """The listing in a few words: `12 .txt files, 1 .md file`, or `no files`."""
    counts = Counter(suffix(path) for path in paths)
    listed = counts.most_common(_MAX_NAMED)
    words = [
        f"{count} {'.' + ext if ext else 'extensionless'} file{'s' * (count > 1)}"
        for ext, count in listed
    ]
    if rest := counts.total() - sum(count for _, count in listed):
        words.append(f"{rest} of {len(counts) - len(listed)} other kinds")
    return ", ".join(words) or "no files"


def list_some(names: Iterable[str]) -> str:
    """The first names of a set, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _MAX_NAMED
    return ", ".join(ordered[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
