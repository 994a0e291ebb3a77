"""What libraries expect of every process, where a container or a random uid lacks it. No torch.

A uid without a passwd entry has no name and perhaps no home; HOME may be a folder that cannot be
written, TMPDIR one that is not there.
"""

import getpass
import os
import stat
import tempfile
from pathlib import Path


def complete() -> None:
    """Set the variables that are missing or of no use. First in a process; children inherit them.

    What can be used is left as it is.
    """
    if not hasattr(os, "getuid"):
        return  # Windows
    try:
        temporary_path = tempfile.gettempdir()  # TMPDIR if it can be written, else /tmp, ...
    except FileNotFoundError:
        temporary_path = None  # whoever needs one tells
    if temporary_path is not None and "TMPDIR" in os.environ:
        os.environ["TMPDIR"] = temporary_path
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"  # as OpenShift has it; without, folders named ~ would be made
    if temporary_path is not None and not os.environ.get("XDG_CACHE_HOME"):
        cache_path = Path("~/.cache").expanduser()
        if not os.path.exists(cache_path) and not os.access(_nearest(cache_path), os.W_OK):
            os.environ["XDG_CACHE_HOME"] = str(_own_folder(Path(temporary_path)))


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
