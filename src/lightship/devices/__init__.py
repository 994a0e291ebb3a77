"""Differences between CPU, CUDA and XLA (TPUs): the only package that checks the kind of device."""

import functools

import torch

from lightship.devices.cuda import CudaDevice
from lightship.devices.device import Device
from lightship.devices.xla import XlaDevice

__all__ = ["Device", "has_bf16_units", "of"]

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
