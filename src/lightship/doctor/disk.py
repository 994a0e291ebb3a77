"""Whether the local disk has room for what a fit caches."""

import os
import shutil

from lightship import storage
from lightship.data.sources.roots import NAMED_ROOTS
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context

_GIB = 2**30
_ARCHIVE_BYTES = 170 * 2**20  # each of the named archives


def cache(context: Context) -> Finding:
    """Free disk for the block cache, or for an archive that is downloaded whole. Blocks."""
    data, folder = context.config.data, storage.cache_path()
    if data.cache_gib and storage.is_remote(data.root):
        cached = sum(p.stat().st_size for p in folder.glob("blocks/*/*") if p.is_file())
        needed = int(data.cache_gib * _GIB) - cached
        what, fix = f"--data.cache_gib {data.cache_gib:g}", "lower --data.cache_gib"
    elif data.root in NAMED_ROOTS:
        needed = 0 if (folder / NAMED_ROOTS[data.root][1]).exists() else _ARCHIVE_BYTES
        what, fix = f"the archive of {data.root}", "give the URL of a copy as --data.root"
    elif data.root_md5 and storage.is_remote(data.root):
        needed, what = storage.size_bytes(data.root), "the archive at --data.root"
        fix = "unpack it and give the folder's URL"
    else:
        return skipped("nothing is cached (--data.cache_gib 0)")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed_gib = shutil.disk_usage(existing).free, max(0, needed) / _GIB
    found = f"{free / _GIB:.1f} GiB free at {folder}; {what} needs {needed_gib:.1f} GiB"
    fix = f"set LIGHTSHIP_CACHE to a folder on a larger disk, or {fix}"
    if not os.access(existing, os.W_OK):
        return Finding("fail", f"{existing} is not writable", "nothing can be cached", fix)
    if free < needed:
        return Finding("fail", found, "fit fails when the disk is full", fix)
    return Finding("ok", found, "enough room")
