"""Values as bytes that are safe to decode, for what ranks send each other.

Not pickle, which runs the code of whoever has sent it: another process may connect in a rank's
place. A message is JSON, followed by the bytes of its arrays.
"""

import dataclasses
import json
import struct
import sys
from typing import Any

import numpy as np

_HEADER = struct.Struct("<Q")
_KINDS = "biuf"
"""Kinds of NumPy's dtypes that hold numbers alone."""


def encode(value: Any) -> bytes:
    """Plain values, arrays of numbers, and dataclasses and named tuples of lightship, nested.

    Raises:
        TypeError: Something else is in it.
    """
    arrays: list[bytes] = []
    header = json.dumps(_plain(value, arrays), separators=(",", ":")).encode()
    return b"".join([_HEADER.pack(len(header)), header, *arrays])


def decode(data: bytes) -> Any:
    """What `encode` was given; array scalars as Python's numbers.

    Raises:
        ValueError: The bytes are none that `encode` returns.
    """
    try:
        (length,) = _HEADER.unpack_from(data)
        header = json.loads(data[_HEADER.size : _HEADER.size + length])
        return _value(header, memoryview(data)[_HEADER.size + length :])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error) as e:
        raise ValueError(f"a rank has sent what no rank sends: {e!r:.200}") from e


def _plain(value: Any, arrays: list[bytes]) -> Any:
    """`value` in JSON's types: what JSON does not have is {kind: its parts}."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), arrays)
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        start = sum(map(len, arrays))
        arrays.append(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
        return {"array": [value.dtype.kind, value.dtype.itemsize, value.shape, start]}
    kind = type(value)
    if kind is bytes:
        return {"bytes": _plain(np.frombuffer(value, dtype=np.uint8), arrays)}
    if kind in (list, tuple, set):
        # A table's file names are a long list of nothing but text.
        is_text = set(map(type, value)) <= {str}
        items = list(value) if is_text else [_plain(each, arrays) for each in value]
        return items if kind is list else {kind.__name__: items}
    if kind is dict:
        return {"dict": [[_plain(key, arrays), _plain(value[key], arrays)] for key in value]}
    if not kind.__module__.startswith("lightship."):
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks")
    fields = value._asdict() if _is_named_tuple(kind) else _fields(value)
    return {"object": [kind.__module__, kind.__qualname__, _plain(fields, arrays)]}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _value(plain: Any, arrays: memoryview) -> Any:
    if isinstance(plain, list):
        return plain if set(map(type, plain)) <= {str} else [_value(e, arrays) for e in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, parts),) = plain.items()
    if kind == "array":
        return _array(arrays, *parts)
    if kind == "bytes":
        return _value(parts, arrays).tobytes()
    if kind == "dict":
        return {_value(key, arrays): _value(value, arrays) for key, value in parts}
    if kind == "object":
        module, name, fields = parts
        return _own_class(module, name)(**_value(fields, arrays))
    return {"tuple": tuple, "set": set}[kind](_value(parts, arrays))


def _array(arrays: memoryview, kind: str, size: int, shape: list[int], start: int) -> np.ndarray:
    if kind not in _KINDS:
        raise ValueError(f"an array of kind {kind!r:.20}")
    dtype = np.dtype(f"<{kind}{size}")
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(arrays, dtype, count, start).reshape(shape).astype(dtype.newbyteorder("="))


def _own_class(module: str, name: str) -> Any:
    """A dataclass or named tuple of lightship that is imported already; nothing else is called."""
    found = getattr(sys.modules[module], name) if module.startswith("lightship.") else None
    if not isinstance(found, type) or found.__module__ != module:
        raise ValueError(f"{module}.{name} is no class of lightship")
    if not (dataclasses.is_dataclass(found) or _is_named_tuple(found)):
        raise ValueError(f"{module}.{name} holds no plain values")
    return found


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")
