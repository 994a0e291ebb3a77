"""Checks of a PyTorch file that may come from anywhere: it holds no more than its bytes.

`weights_only` runs no code, but a few bytes can still ask for any amount of memory or time: by
compressed entries, by views of one number as 10^12, by objects that hold each other many times.
"""

import io
import itertools
import pickletools
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from lightship.errors import ConfigError
from lightship.host import read_limits, usable_memory_bytes

_REFUSED = (
    b"_codecs\nencode\n", b"\nbytearray\n", b"_utils\n_rebuild_sparse_tensor\n",
    b"_utils\n_rebuild_qtensor\n", b"_utils\n_rebuild_nested_tensor\n",
    b"_utils\n_rebuild_meta_tensor_no_storage\n", b"_utils\n_rebuild_wrapper_subclass\n",
    b"_utils\n_rebuild_device_tensor",
)  # fmt: skip
"""What the unpickler may call, and no state dict needs: each can take any time or memory."""
_OBJECT_BYTES = 64
"""Memory that one byte of a pickle can ask for: an empty dictionary."""
_EMPTY_SET = b"\x8f"
"""216 bytes each, and in no checkpoint: more than the numbers' bytes have by chance are refused."""
_MAX_LEGACY_OPCODES = 1_000_000
_LEGACY_PICKLES = 5
"""Before torch 1.6: magic number, protocol, system, content, keys; then the tensors' bytes."""
_END_OF_ARCHIVE = struct.Struct("<4s4H2LH")
_MAX_DEPTH = 64
_MAX_SHARING = 16
"""Tensors of a file have at most so many times its bytes: some share memory, as tied weights."""
_LEAVES = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.layout)


def check_file(payload: bytes, name: str) -> None:
    """Check a file before it is unpickled.

    Args:
        payload: The file.
        name: Names the file in errors.

    Raises:
        ConfigError: It is not as `torch.save` writes it, or asks for more than it has.
    """
    if not payload.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle (before torch 1.6)
        start = f"it begins with {bytes(payload[:16])!r}" if payload else "it is empty"
        raise ConfigError(f"{name} is not a PyTorch file ({start})")
    pickled = payload
    if payload.startswith(b"PK"):
        pickled = _pickle_of(payload, name)
        limit = usable_memory_bytes(read_limits())
        if limit is not None and _OBJECT_BYTES * len(pickled) > limit:
            raise ConfigError(
                f"{name} has {len(pickled):,} bytes of pickle, which can take more memory than "
                f"there is ({limit / 2**30:.1f} GiB)"
            )
        if pickled.count(_EMPTY_SET) > 100 + len(pickled) // 50:
            raise ConfigError(f"{name} holds sets, which no file of weights does")
    else:
        _check_legacy(payload, name)
    for called in _REFUSED:
        if called in pickled:
            shown = called.decode().strip().replace("\n", ".")
            raise ConfigError(f"{name} needs {shown} to be unpickled and is refused")


def _pickle_of(payload: bytes, name: str) -> bytes:
    """The pickle in an archive whose entries are plain, and together no larger than it."""
    wrong = ConfigError(f"{name} is not an archive as torch.save writes it")
    try:
        # One that ends in its directory has one meaning to every reader.
        signature, *_, comment = _END_OF_ARCHIVE.unpack(payload[-_END_OF_ARCHIVE.size :])
        if (signature, comment) != (b"PK\x05\x06", 0):
            raise wrong
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            entries = archive.infolist()
            is_plain = all(
                entry.compress_type == zipfile.ZIP_STORED
                and entry.compress_size == entry.file_size
                and not entry.flag_bits & 1
                for entry in entries
            )
            names = {entry.filename for entry in entries}
            size_bytes = sum(entry.file_size for entry in entries)
            if not is_plain or size_bytes > len(payload) or len(names) < len(entries):
                raise wrong
            # torch's reader takes no notice of the case.
            [pickled] = [n for n in names if n.casefold().rpartition("/")[2] == "data.pkl"]
            return archive.read(pickled)
    except (
        zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError,
    ) as error:  # fmt: skip
        if error is wrong:
            raise
        raise wrong from error


def _check_legacy(payload: bytes, name: str) -> None:
    """Bound the objects in the pickles at the start of a file of torch before 1.6."""
    file, left = io.BytesIO(payload), _MAX_LEGACY_OPCODES
    try:
        for _ in range(_LEGACY_PICKLES):
            left -= sum(1 for _ in itertools.islice(pickletools.genops(file), left + 1))
            if left < 0:
                raise ConfigError(f"{name} has more objects than a file of weights")
    except ConfigError:
        raise
    except ValueError:  # cut off, or of fewer pickles: torch says what is wrong
        return


def check_content(loaded: Any, max_bytes: int, name: str) -> None:
    """Check what a file held, before anything walks over it or copies it.

    Args:
        loaded: From `torch.load`.
        max_bytes: Size of the file.
        name: Names the file in errors.

    Raises:
        ConfigError: Tensors that are not plain or larger than the file; containers that are nested
            deeply, within themselves, or with more values than the file has bytes; other objects.
    """
    counted = _Counter(name)
    values, tensor_bytes = counted.count(loaded, 0)
    if values > max_bytes:
        raise ConfigError(f"{name} has {values:,} values in {max_bytes:,} bytes")
    if tensor_bytes > _MAX_SHARING * max_bytes:
        raise ConfigError(f"{name} has tensors of {tensor_bytes:,} bytes in {max_bytes:,}")


class _Counter:
    """Counts values and bytes of tensors, those of a shared container each time it is met."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[int, tuple[int, int] | None] = {}

    def count(self, value: Any, depth: int) -> tuple[int, int]:
        """(values, bytes of tensors) in and below `value`."""
        if isinstance(value, torch.Tensor):
            return 1, self._tensor_bytes(value)
        if isinstance(value, _LEAVES):
            return 1, 0
        if type(value) is Namespace:  # a script's arguments, beside the weights
            value = vars(value)
        if not isinstance(value, (dict, list, tuple, set)):
            raise ConfigError(f"{self._name} holds a {type(value).__name__}, no plain value")
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{self._name} is nested too deeply")
        if id(value) not in self._known:
            self._known[id(value)] = None
            self._known[id(value)] = self._inner(value, depth)
        known = self._known[id(value)]
        if known is None:
            raise ConfigError(f"{self._name} holds a {type(value).__name__} that holds itself")
        return known

    def _inner(self, value: Any, depth: int) -> tuple[int, int]:
        inner = [*value, *value.values()] if isinstance(value, dict) else list(value)
        attributes = getattr(value, "__dict__", {})  # an OrderedDict has them
        if attributes:
            inner.append(_plain_metadata(attributes, self._name))
        counts = [self.count(each, depth + 1) for each in inner]
        return 1 + sum(count for count, _ in counts), sum(size for _, size in counts)

    def _tensor_bytes(self, value: torch.Tensor) -> int:
        size_bytes = value.numel() * value.element_size()
        is_plain = (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout == torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            and not vars(value)
        )
        if not is_plain or size_bytes > value.untyped_storage().nbytes():
            raise ConfigError(
                f"{self._name} holds a tensor that is not plain: {list(value.shape)}, "
                f"{value.dtype}, {value.layout}"
            )
        return size_bytes


def _plain_metadata(attributes: Mapping[str, Any], name: str) -> Any:
    """`_metadata` of a state dict: module -> its `version` and the like, plain values."""
    kept = attributes.get("_metadata")
    if (
        attributes.keys() != {"_metadata"}
        or not isinstance(kept, dict)
        or getattr(kept, "__dict__", {})
        or not all(isinstance(key, str) and type(each) is dict for key, each in kept.items())
    ):
        raise ConfigError(f"{name} holds a dictionary with attributes that no state dict has")
    return kept
