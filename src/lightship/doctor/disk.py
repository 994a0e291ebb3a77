"""Whether the local disk has room for what a fit keeps there."""

import os
import shutil
from pathlib import Path

from lightship import storage
from lightship.config import DataConfig
from lightship.data.sources.layouts import NAMED_ROOTS
from lightship.doctor.check import Finding, skipped

_GIB = 2**30
_ARCHIVE_BYTES = 170 * 2**20  # each of the named archives


def cache(data: DataConfig, folder: Path | None = None) -> Finding:
    """Free disk for the block cache, or for an archive that is fetched whole.

    Args:
        data: The data section.
        folder: The cache; default: that of `storage.cache_path`.
    """
    folder = folder or storage.cache_path()
    needed = 0
    if data.cache_gib and storage.is_remote(data.root):
        needed = int(data.cache_gib * _GIB) - _used_bytes(folder / "blocks")
        what, flag = f"--data.cache_gib {data.cache_gib:g}", "lower --data.cache_gib"
    elif data.root in NAMED_ROOTS:
        md5 = NAMED_ROOTS[data.root][1]
        needed = 0 if (folder / md5).exists() else _ARCHIVE_BYTES
        what, flag = f"the archive of {data.root}", "give a copy's URL as --data.root"
    elif data.root_md5 and storage.is_remote(data.root):
        needed, what = storage.size_bytes(data.root), "the archive at --data.root"
        flag = "unpack it and give the folder's URL"
    else:
        return skipped("nothing is cached (--data.cache_gib 0)")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    told = f"{free / _GIB:.1f} GiB free at {folder}; {what} needs {max(0, needed) / _GIB:.1f} GiB"
    elsewhere = f"set LIGHTSHIP_CACHE to a folder on a larger disk, or {flag}"
    if not os.access(there, os.W_OK):
        return Finding("fail", f"{there} cannot be written", "nothing can be kept", elsewhere)
    if free < needed:
        return Finding("fail", told, "the fit ends when the disk is full", elsewhere)
    return Finding("ok", told, "room for all of it")


def _used_bytes(folder: Path) -> int:
    """What the cache already has, which is part of its size."""
    return sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())
