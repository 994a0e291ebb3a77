"""Antialiased scaling by torch's own kernel, without importing torch.

The kernel is in `libtorch_cpu`; it is called through that library's stable C interface
(https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html). In each data
worker, loading the library takes a seventh of the CPU time of `import torch` and a quarter of its
memory. Where it lacks the interface (torch < 2.10) or cannot be loaded, torch is imported: the
pixels are the same.
"""

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from lightship.errors import DataError

Kernel = Callable[[np.ndarray, np.ndarray, str], None]
"""Scales an image [H, W, 3] uint8 (contiguous) into another one; "bilinear" or "bicubic"."""
SYMBOLS = (
    "torch_call_dispatcher",
    "torch_new_list_reserve_size",
    "torch_list_push_back",
    "aoti_torch_create_tensor_from_blob",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_dtype_uint8",
    "aoti_torch_device_type_cpu",
)
"""Functions of the C interface, as declared in torch/csrc/stable/c/shim.h and
torch/csrc/inductor/aoti_torch/c/shim.h; each returns 0 unless it failed."""
_BUILT_FOR = 2 << 56 | 10 << 48
"""Version of the interface that the calls below follow: 2.10."""


def scale(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Scale an image, antialiased. For any thread; the GIL is released.

    Args:
        image: [H, W, 3] uint8, contiguous.
        height: Of the result.
        width: Of the result.
        interpolation: bilinear or bicubic.

    Returns:
        [height, width, 3] uint8: as `F.interpolate(antialias=True)`, bit for bit.

    Raises:
        DataError: It has another number of channels: the kernel would leave a part of the result as
            the memory was.
    """
    if image.shape[2:] != (3,):
        raise DataError(f"an image of the shape {image.shape}, not [height, width, 3]")
    out = np.empty((height, width, 3), dtype=np.uint8)
    kernel()(image, out, interpolation)
    return out


@functools.cache
def kernel() -> Kernel:
    """Torch's kernel, by its C interface if there is one. Loads a library at the first call."""
    library = load_library()
    return imported_kernel() if library is None else library_kernel(library)


def load_library() -> Any | None:
    """`libtorch_cpu`; None where it cannot be loaded or lacks the interface."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / name))
    except OSError:
        return None
    return library if all(hasattr(library, symbol) for symbol in SYMBOLS) else None


def library_kernel(library: Any) -> Kernel:
    """The kernel of a loaded `libtorch_cpu`."""
    library.torch_call_dispatcher.argtypes = [c_char_p, c_char_p, POINTER(c_uint64), c_uint64]
    library.torch_new_list_reserve_size.argtypes = [c_size_t, POINTER(c_void_p)]
    library.torch_list_push_back.argtypes = [c_void_p, c_uint64]
    library.aoti_torch_delete_tensor_object.argtypes = [c_void_p]
    create = library.aoti_torch_create_tensor_from_blob
    create.argtypes = [
        c_void_p, c_int64, POINTER(c_int64), POINTER(c_int64), c_int64,
        c_int32, c_int32, c_int32, POINTER(c_void_p),
    ]  # fmt: skip
    kind = library.aoti_torch_dtype_uint8(), library.aoti_torch_device_type_cpu(), 0

    def view(image: np.ndarray) -> int:
        """A handle of an image's memory as [1, 3, H, W] (channels_last)."""
        height, width, channels = image.shape
        sizes = (c_int64 * 4)(1, channels, height, width)
        strides = (c_int64 * 4)(image.size, 1, width * channels, channels)
        handle = c_void_p()
        _check(create(image.ctypes.data, 4, sizes, strides, 0, *kind, byref(handle)))
        return handle.value or 0

    def run(image: np.ndarray, out: np.ndarray, interpolation: str) -> None:
        size = c_void_p()
        _check(library.torch_new_list_reserve_size(2, byref(size)))
        for side in out.shape[:2]:
            _check(library.torch_list_push_back(size, side))
        # input, output_size, align_corners, scales_h, scales_w, out: the call takes them over,
        # and leaves what it returns.
        stack = (c_uint64 * 6)(view(image), size.value or 0, 0, 0, 0, view(out))
        name = f"aten::_upsample_{interpolation}2d_aa".encode()
        _check(library.torch_call_dispatcher(name, b"out", stack, _BUILT_FOR))
        _check(library.aoti_torch_delete_tensor_object(stack[0]))

    return run


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"libtorch_cpu cannot scale an image (error {code})")


def imported_kernel() -> Kernel:
    """The kernel as torch's Python package has it.

    `F.interpolate` itself returns CHW: transposing that takes longer than scaling.
    """
    import torch

    operators = torch.ops.aten
    kernels = {
        "bilinear": operators._upsample_bilinear2d_aa.out,
        "bicubic": operators._upsample_bicubic2d_aa.out,
    }

    def view(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image[None]).permute(0, 3, 1, 2)

    def run(image: np.ndarray, out: np.ndarray, interpolation: str) -> None:
        size = list(out.shape[:2])
        kernels[interpolation](view(image), size, False, None, None, out=view(out))

    return run
