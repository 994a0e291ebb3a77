"""What libraries expect of every process, where a container or a random uid lacks it. No torch.

A uid without a passwd entry has no name and perhaps no home; HOME may be a folder that cannot be
written, TMPDIR one that is not there.
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
    """Give the user a name and a home. First in a process; children inherit the variables.

    What can be used is left as it is, here and below.
    """
    if not hasattr(os, "getuid"):
        return  # Windows
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"  # as OpenShift has it; without, folders named ~ would be made


def provide_folders(output: str | None) -> None:
    """See to a temporary folder, and to one for caches where the home cannot be written.

    Args:
        output: Where files may be written if nowhere else; None or remote: it does not help.

    Raises:
        ConfigError: There is no temporary folder.
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


def _made_temporary(output: str | None) -> str:
    """A new temporary folder, removed at the end: of memory, or at the output."""
    parents = ["/dev/shm", *([output] if output and "://" not in output else [])]
    for parent in parents:
        with contextlib.suppress(OSError):
            os.makedirs(parent, exist_ok=True)
            path = tempfile.mkdtemp(prefix=".lightship-", dir=parent)
            atexit.register(shutil.rmtree, path, ignore_errors=True)
            os.environ["TMPDIR"] = tempfile.tempdir = path
            return path
    raise ConfigError(
        "there is no folder for temporary files: set TMPDIR to one that can be written"
    )


def _nearest(path: Path) -> Path:
    """The innermost folder of `path` that is there."""
    return next(each for each in path.parents if os.path.exists(each))


def _own_folder(parent: Path) -> Path:
    """This user's folder under one that others can write; the same for all processes."""
    path = parent / f"lightship-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="lightship-"))  # somebody else's
    return path
