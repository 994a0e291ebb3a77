"""Standard JSON: numbers that are not finite become null, and secrets are left out."""

import json
import math
from typing import Any

import numpy as np

from lightship.redaction import redact


def dumps(value: Any) -> str:
    """`value` as indented JSON. NumPy values become plain ones; other types become their str."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else redact(str(value))
