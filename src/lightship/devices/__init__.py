"""Differences between CPU, CUDA and XLA (TPUs): the only package that checks the kind of device."""

import functools

import torch

from lightship.devices.cuda import CudaDevice
from lightship.devices.device import Device
from lightship.devices.xla import XlaDevice

__all__ = ["Device", "fastest_precision", "has_bf16_units", "of"]

PRIVATE_NAMES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""Of torch.cpu. Where they are missing, bfloat16 counts as emulated."""


class MpsDevice(Device):
    """Apple's GPUs."""

    widest_float = torch.float32  # no float64


@functools.cache
def of(device: torch.device) -> Device:
    """The implementation for this kind of device."""
    kinds = {"cuda": CudaDevice, "xla": XlaDevice, "mps": MpsDevice}
    return kinds.get(device.type, Device)(device)


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 is fast: some CPUs only emulate it."""
    if device.type == "cpu":
        return any(getattr(torch.cpu, name, bool)() for name in PRIVATE_NAMES)
    return device.type in ("cuda", "xla")


def fastest_precision(asked: str, accelerator: str) -> str:
    """`--trainer.precision` as Lightning takes it; `auto` is the fastest that trains alike.

    Args:
        asked: The setting.
        accelerator: `--trainer.accelerator`.

    Returns:
        For `auto`: bf16-mixed where the device computes in bfloat16 without emulating it, 16-mixed
        on older GPUs, else 32-true. For 16-mixed on a CPU: bf16-mixed, as Lightning does. Every
        other setting as it is.
    """
    if asked == "16-mixed" and _is_cpu(accelerator):
        return "bf16-mixed"
    if asked != "auto":
        return asked
    if accelerator == "tpu":
        return "bf16-mixed"
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if has_bf16 else "16-mixed"
    if accelerator in ("auto", "cpu") and has_bf16_units(torch.device("cpu")):
        return "bf16-mixed"
    return "32-true"


def _is_cpu(accelerator: str) -> bool:
    """Whether `--trainer.accelerator` means the CPU here."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not has_gpu)
