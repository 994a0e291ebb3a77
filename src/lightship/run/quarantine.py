"""Damaged files that a run can do without: moved aside with a line, and the run goes on."""

from collections.abc import Callable

from lightship import storage

SUFFIX = ".damaged"


def set_aside(url: str, what: str, say: Callable[[str], None]) -> None:
    """Move a damaged file to `url` + SUFFIX, where nothing reads it. Rank 0; blocks.

    Args:
        url: Of the file.
        what: What is wrong with it.
        say: Prints a line for the user.
    """
    storage.write_bytes(f"{url}{SUFFIX}", storage.read_bytes(url))
    storage.remove(url)
    name = storage.redact(url)
    say(f"{name} {what}: moved to {storage.base_name(url)}{SUFFIX}, and the run goes on without it")
