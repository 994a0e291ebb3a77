"""Scaling by libtorch's C interface: the pixels of torch, bit for bit, and what happens without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from lightship.data.images import scaling
from lightship.errors import DataError

SIZES = [(1, 1, 5, 3), (30, 41, 30, 20), (64, 48, 32, 24), (20, 33, 57, 80), (97, 3, 11, 1)]
KERNELS = ["library", "imported"]


def kernel(name: str) -> scaling.Kernel:
    if name == "imported":
        return scaling.imported_kernel()
    library = scaling.load_library()
    if library is None and torch.__version__ < "2.10":
        pytest.skip("this torch has no stable C interface, which begins with 2.10")
    assert library is not None, "a symbol of SYMBOLS is gone, or the library's name is another"
    return scaling.library_kernel(library)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_of_interpolate(name: str, interpolation: str) -> None:
    run = kernel(name)
    for height, width, *size in SIZES:
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        out = np.full((*size, 3), 7, dtype=np.uint8)
        run(image, out, interpolation)
        chw = torch.from_numpy(image).permute(2, 0, 1)[None]
        expected = interpolate(chw, size, mode=interpolation, antialias=True)[0]
        np.testing.assert_array_equal(out, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(4, 4, 1), (4, 4, 4), (4, 4)])
def test_an_image_of_other_channels_is_refused(shape: tuple[int, ...]) -> None:
    """The kernel scales as many as there are: into a result of three, or beyond it."""
    with pytest.raises(DataError, match=r"not \[height, width, 3\]"):
        scaling.scale(np.zeros(shape, dtype=np.uint8), 2, 2, "bilinear")


def test_a_failed_call_is_an_error() -> None:
    library = scaling.load_library()
    if library is None:
        pytest.skip("this torch has no stable C interface, which begins with 2.10")
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="libtorch_cpu cannot scale an image"):
        scaling.library_kernel(library)(image, np.zeros((2, 2, 3), np.uint8), "no_such")


def test_without_the_interface_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.ctypes, "CDLL", lambda path: SimpleNamespace(other=None))
    assert scaling.load_library() is None
    assert scaling.kernel.__wrapped__().__qualname__.startswith("imported_kernel")
