"""Native libraries that must not be looked for in the working directory."""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path


def preload() -> None:
    """Load NVIDIA's libcusparseLt, if it is installed, from within `/`. First in a process.

    When torch loads it, it looks for libcuda.so.1 in the working directory, and there before the
    system's: its RUNPATH is `$ORIGIN:`. The directory changes for a moment, for all threads.
    """
    found = importlib.util.find_spec("nvidia")
    folders = (found and found.submodule_search_locations) or ()
    paths = [path for each in folders for path in Path(each).glob("cusparselt/lib/*Lt.so*")]
    if not paths or not os.access(".", os.X_OK):  # where nothing can be opened either
        return
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return  # deleted: it is empty
    os.chdir("/")
    try:
        with contextlib.suppress(OSError):  # which torch reports
            ctypes.CDLL(str(paths[0]))
    finally:
        os.chdir(here)
