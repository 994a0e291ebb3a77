"""Folders of local caches that are this user's alone."""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def make_private(folder: Path, what: str) -> bool:
    """Whether the folder, made if missing, is this user's and closed to others (mode 0700).

    Nor may others be able to put another folder in its place, by its parent's mode; the folders
    above that are not looked at, for a pod's volume is writable for all. A warning names a folder
    that is refused; one that cannot be made is only logged for debugging.

    Args:
        folder: The last part of its path is made with mode 0700.
        what: What is not cached otherwise: `decoded images are`.
    """
    if not hasattr(os, "getuid"):
        return False  # Windows
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status, parent_mode = folder.lstat(), folder.parent.stat().st_mode
    except OSError as error:
        logger.debug(f"{what} not cached: {error}")
        return False
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & 0o077:
        logger.warning(
            f"{folder} is not a folder that only you can read (mode 0700): {what} not cached"
        )
        return False
    if parent_mode & stat.S_IWOTH and not parent_mode & stat.S_ISVTX:
        logger.warning(
            f"{folder.parent} is a folder where any user can rename {folder.name} "
            f"(mode {parent_mode & 0o7777:04o}; chmod o-w or +t): {what} not cached"
        )
        return False
    return True


def is_own_file(descriptor: int) -> bool:
    """Whether an open file is a regular one of this user."""
    status = os.fstat(descriptor)
    is_ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()  # not on Windows
    return stat.S_ISREG(status.st_mode) and is_ours
