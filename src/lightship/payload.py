"""A checkpoint's bytes: a copy of a run's state that later steps cannot change, and back."""

import copy
import io
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from lightship.exits import ConfigError


def take_snapshot(value: Any) -> Any:
    """A copy on the CPU that later steps cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same kind, with the _metadata of a state_dict
        copied.update({key: take_snapshot(item) for key, item in value.items()})
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(take_snapshot(item) for item in value)
    return value


def to_bytes(snapshot: dict[str, Any]) -> memoryview:
    """The file's content, as `torch.save` writes it, while other threads go on. Blocks."""
    memory = _Memory(_tensor_bytes(snapshot))
    torch.save(snapshot, cast(BinaryIO, memory))  # all of a file that torch calls
    return memory.written()


def from_bytes(payload: bytes, name: str) -> dict[str, Any]:
    """A checkpoint's content without running any code in it.

    Raises:
        ConfigError: The file holds more than tensors and plain values.
    """
    try:
        # Said outright, so that no environment variable can turn it off.
        loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"checkpoint {name} needs code to be unpickled and is refused ({reason})"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{name} is not a checkpoint ({reason})") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"checkpoint {name} holds a {type(loaded).__name__}, not a dictionary")
    return dict(loaded)


class _Memory:
    """What `torch.save` writes into, without stopping other threads.

    BytesIO copies, grows and touches new pages under Python's lock: training would stand still for
    a second with a checkpoint of 500 MB. NumPy lets go of the lock for that.

    Args:
        expected_bytes: Of all tensors; the rest is taken to be little, but may be more.
    """

    def __init__(self, expected_bytes: int) -> None:
        self._bytes = np.empty(expected_bytes + expected_bytes // 16 + 2**22, dtype=np.uint8)
        self._end = 0

    def write(self, data: Any) -> int:
        """Append; torch calls it."""
        piece = np.frombuffer(data, dtype=np.uint8)
        end = self._end + len(piece)
        if end > len(self._bytes):
            larger = np.empty(2 * end, dtype=np.uint8)
            larger[: self._end] = self._bytes[: self._end]
            self._bytes = larger
        self._bytes[self._end : end] = piece
        self._end = end
        return len(piece)

    def flush(self) -> None:
        """Nothing to do; torch calls it."""

    def written(self) -> memoryview:
        """All of it, uncopied."""
        return self._bytes[: self._end].data


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
