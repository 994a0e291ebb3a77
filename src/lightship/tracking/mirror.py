"""Copies of an offline W&B run at a remote output."""

import time
from pathlib import Path

from lightship import storage
from lightship.errors import in_one_line

_COPY_EVERY_S = 120.0


class Mirror:
    """A copy of an offline run's folder at a URL, which survives this machine.

    Args:
        run_path: The folder.
        parent_url: Parent of the copy, which has the folder's name.

    Attributes:
        url: Of the copy; downloaded again, `wandb sync` takes it.
        error: Why the last copy is incomplete; None: it is complete.
    """

    def __init__(self, run_path: Path, parent_url: str) -> None:
        self._path = run_path
        self.url = storage.join(parent_url, run_path.name)
        self.error: str | None = None
        self._sent: dict[Path, tuple[int, int]] = {}
        self._next_s = time.monotonic() + _COPY_EVERY_S

    def copy(self) -> None:
        """Copy the files that have changed since the last copy. Blocks; never raises."""
        try:
            for path in sorted(self._path.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    is_now = path.stat().st_size, path.stat().st_mtime_ns
                    if self._sent.get(path) != is_now:
                        parts = path.relative_to(self._path).parts
                        storage.write_file(storage.join(self.url, *parts), path)
                        self._sent[path] = is_now
            self.error = None
        except Exception as error:
            self.error = in_one_line(error)

    def copy_if_due(self) -> None:
        """Copy every 120 s, or every 20 times as long as a copy takes. Blocks; never raises."""
        began_s = time.monotonic()
        if began_s >= self._next_s:
            self.copy()
            took_s = time.monotonic() - began_s
            self._next_s = time.monotonic() + max(_COPY_EVERY_S, 20 * took_s)
