"""GPUs of NVIDIA (and, by torch's own name for them, of AMD)."""

from typing import Any

import torch
from torch import Tensor

from lightship.devices.device import Device, Uploads


class CudaDevice(Device):
    """A GPU."""

    def seed(self, key: int) -> None:
        """Seed the generators of the CPU and of this GPU only."""
        super().seed(key)
        torch.cuda.default_generators[self.device.index or 0].manual_seed(key)

    def uploads(self, slots: Tensor) -> Uploads:
        """Copies that overlap with the computation."""
        return CudaUploads(self, slots)

    def peak_bytes(self) -> int | None:
        """Peak memory of tensors."""
        return torch.cuda.max_memory_allocated(self.device)


class CudaUploads(Uploads):
    """Asynchronous copies from pinned memory, if it can be pinned."""

    def __init__(self, to: Device, slots: Tensor) -> None:
        super().__init__(to)
        self.slots = slots
        pinned = torch.cuda.cudart().cudaHostRegister(slots.data_ptr(), slots.numel(), 0)
        self.is_pinned = int(pinned) == 0

    def begin(self, *parts: Tensor) -> tuple[list[Tensor], Any]:
        """See `Uploads.begin`; on the current stream."""
        moved = [part.to(self.to.device, non_blocking=True) for part in parts]
        if not self.is_pinned:
            return moved, None
        copied = torch.cuda.Event()
        copied.record()
        return moved, copied

    def close(self) -> None:
        """Wait for the copies, and unpin the memory."""
        if self.is_pinned:
            torch.cuda.synchronize(self.to.device)
            torch.cuda.cudart().cudaHostUnregister(self.slots.data_ptr())
