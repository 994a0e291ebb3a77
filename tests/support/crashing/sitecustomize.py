"""See __init__.py."""

import ctypes
import os
import re
import signal
import sys
from typing import Any

if "lightship.data.streaming.worker" in " ".join(sys.orig_argv):
    from lightship.data.images import decode

    _decode = decode._decode_image

    def _crash(data: bytes, *args: Any) -> Any:
        if found := re.search(rb"crash:(\w+)$", bytes(data[-20:])):
            if found[1] == b"SIGSEGV":
                ctypes.string_at(0)
            os.kill(os.getpid(), signal.Signals[found[1].decode()])
        return _decode(data, *args)

    decode._decode_image = _crash
