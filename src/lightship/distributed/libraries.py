"""How libraries are loaded: quickly, and none from the working directory."""

import contextlib
import ctypes
import gc
import importlib.util
import os
from pathlib import Path

_USUAL = gc.get_threshold()
_SELDOM = 50_000


def begin_imports() -> None:
    """Look for garbage seldom, until `end_imports`. First in a process.

    What torch and Lightning import is none, and looking at it takes a fifth of their time.
    """
    gc.set_threshold(_SELDOM, *_USUAL[1:])


def end_imports() -> None:
    """Look for garbage as usual again, but not at what is alive now: modules, most of all."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


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
