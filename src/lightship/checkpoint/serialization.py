"""A checkpoint as bytes: a snapshot of the state that later steps cannot change, and back."""

import copy
import gc
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from lightship import devices
from lightship.checkpoint.content import check_content, check_file
from lightship.errors import ConfigError


def take_snapshot(value: Any) -> Any:
    """A copy on the CPU that later steps cannot change. Blocks for the device."""
    tensors = list(_tensors(value))
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    return _rebuilt(value, iter(devices.of(device).copies(tensors)))


def _rebuilt(value: Any, copies: Iterator[torch.Tensor]) -> Any:
    """`value` with the copies in the place of its tensors, which come in the order of _tensors."""
    if isinstance(value, torch.Tensor):
        return next(copies)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same kind, with the _metadata of a state_dict
        copied.update({key: _rebuilt(item, copies) for key, item in value.items()})
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuilt(item, copies) for item in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def to_bytes(snapshot: dict[str, Any]) -> memoryview:
    """Serialize with `torch.save`, without stopping other threads. Blocks."""
    memory = _Memory(sum(t.numel() * t.element_size() for t in _tensors(snapshot)))
    torch.save(snapshot, cast(BinaryIO, memory))  # all of a file that torch calls
    return memory.written()


def from_bytes(payload: bytes, name: str) -> dict[str, Any]:
    """A checkpoint's content without running any code in it.

    Args:
        payload: The file.
        name: Names the file in errors.

    Raises:
        ConfigError: The file holds more than tensors and plain values, or asks for more memory
            than its bytes.
    """
    check_file(payload, name)
    collects = gc.isenabled()
    gc.disable()  # which takes the square of the time for many small objects
    try:
        # The settings of torchvision's and timm's scripts lie beside the weights as a Namespace,
        # which only holds values. weights_only is said outright, so that no environment variable
        # can turn it off.
        with torch.serialization.safe_globals([Namespace]):
            loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{name} needs code to be unpickled and is refused ({reason})") from None
    except Exception as error:  # whatever the unpickler meets in a file of another kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ConfigError(f"{name} cannot be read as a PyTorch file ({reason})") from None
    finally:
        if collects:
            gc.enable()
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{name} holds a {type(loaded).__name__}, not a dictionary")
    check_content(loaded, len(payload), name)
    return dict(loaded)


class _Memory:
    """What `torch.save` writes into, without stopping other threads.

    BytesIO copies, grows and touches new pages while it holds the GIL: a checkpoint of 500 MB would
    block training for a second. NumPy releases the GIL.

    Args:
        expected_bytes: Size of all tensors; more is allocated as needed.
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
