"""Damaged files that a run can do without: moved aside, with a warning."""

import logging

from lightship import storage

logger = logging.getLogger(__name__)
SUFFIX = ".damaged"


def set_aside(url: str, what: str) -> None:
    """Move a damaged file to `url` + SUFFIX, where nothing reads it. Rank 0; blocks.

    Args:
        url: Of the file.
        what: What is wrong with it.
    """
    storage.move(url, f"{url}{SUFFIX}")
    name = storage.redact(url)
    logger.warning(f"{name} {what}: moved to {storage.base_name(url)}{SUFFIX} and ignored")
