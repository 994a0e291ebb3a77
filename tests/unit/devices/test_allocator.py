"""Memory of large tensors is used again."""

import ctypes
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from lightship.devices.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
np.ones(2**26, dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**26, dtype=np.uint8)  # 64 MiB: 16,384 pages of 4 KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="the C library has no mallopt",
)
def test_pages_of_a_freed_tensor_are_not_cleared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", CODE, how]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert faults("kept") < faults("returned") / 10
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert faults("kept") > 100, "bounds of the environment win"
