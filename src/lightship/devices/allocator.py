"""The C library's allocator, for training on a CPU."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OWN_BOUNDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have glibc keep the memory of large tensors for the next ones, for the rest of the process.

    By default it returns each block of over 32 MiB to the kernel, which clears it page by page for
    the next tensor of that size: of four forward passes of tf_efficientnet_lite0 on 64 images of
    224 px these were 2.8 million page faults, and 38 % of the CPU time. Nothing changes where the
    C library is another, or the environment sets bounds of its own.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_BOUNDS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
