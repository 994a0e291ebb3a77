"""Manifest tables that somebody else has made: any header, with right check sums."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightship.data.columns import _MAGIC, TRAILER_BYTES


def forge_table(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a table in place."""
    data = path.read_bytes()
    _, _, version, length, _ = data[-TRAILER_BYTES:].decode().split()
    end = len(data) - TRAILER_BYTES - int(length)
    header = json.loads(data[end:-TRAILER_BYTES])
    change(header)
    changed = json.dumps(header).encode()  # Infinity, too, is JSON for Python
    digest = hashlib.sha256(changed).hexdigest()
    trailer = f"{_MAGIC} {version} {len(changed)} {digest}"
    path.write_bytes(data[:end] + changed + trailer.ljust(TRAILER_BYTES - 1).encode() + b"\n")
