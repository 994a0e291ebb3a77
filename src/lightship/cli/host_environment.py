"""Completes what libraries expect of a process and containers may lack. Imports no torch.

A uid without a passwd entry has no name and perhaps no home; HOME may not be writable, TMPDIR may
not exist.
"""

import atexit
import contextlib
import getpass
import os
import shutil
import stat
import tempfile
from pathlib import Path

from lightship.errors import ConfigError


def complete() -> None:
    """Set LOGNAME and HOME if they are missing. First in a process; children inherit them."""
    if not hasattr(os, "getuid"):
        return  # Windows
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"  # as OpenShift does; without it, folders named ~ would be created


def provide_folders(output: str | None) -> None:
    """Set TMPDIR, and XDG_CACHE_HOME if the home is not writable.

    Args:
        output: The folder to use if no other is writable; None or remote: not used.

    Raises:
        ConfigError: There is no writable folder for temporary files.
    """
    try:
        path = tempfile.gettempdir()  # TMPDIR if it can be written, else /tmp, ...
    except FileNotFoundError:
        path = _made_temporary(output)
    if os.environ.get("TMPDIR", path) != path:
        os.environ["TMPDIR"] = path
    if not os.environ.get("XDG_CACHE_HOME") and hasattr(os, "getuid"):
        cache_path = Path(os.path.expanduser("~/.cache")).absolute()
        if not os.path.exists(cache_path) and not os.access(_nearest(cache_path), os.W_OK):
            cache_path = _own_folder(Path(path))
            os.environ["XDG_CACHE_HOME"] = str(cache_path)
            # Torchmetrics imports Matplotlib if it is installed, which warns of such a home.
            os.environ.setdefault("MPLCONFIGDIR", str(cache_path / "matplotlib"))


def _made_temporary(output: str | None) -> str:
    """A new temporary folder, removed at exit: in shared memory, or at the output."""
    parents = ["/dev/shm", *([output] if output and "://" not in output else [])]
    for parent in parents:
        with contextlib.suppress(OSError):
            os.makedirs(parent, exist_ok=True)
            path = tempfile.mkdtemp(prefix=".lightship-", dir=parent)
            atexit.register(shutil.rmtree, path, ignore_errors=True)
            os.environ["TMPDIR"] = tempfile.tempdir = path
            return path
    raise ConfigError("no writable folder for temporary files: set TMPDIR")


def _nearest(path: Path) -> Path:
    """The innermost parent of `path` that exists."""
    return next(each for each in path.parents if os.path.exists(each))


def _own_folder(parent: Path) -> Path:
    """This user's folder under one that others can write to; the same for all processes."""
    path = parent / f"lightship-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="lightship-"))  # another user's
    return path
