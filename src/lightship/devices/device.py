"""What a device does for training, and the CPU's way to do it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Device:
    """The CPU, and any device that needs no special treatment.

    Attributes:
        device: The torch device.
        chips: Number of chips that this process drives as one device.
        widest_float: The dtype of sums.
        compiles_steps: Whether numbers that change per step must be tensors.
    """

    chips = 1
    widest_float = torch.float64
    compiles_steps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seed(self, key: int) -> None:
        """Seed the generators that a step on this device uses."""
        torch.default_generator.manual_seed(key)

    def upload(self, part: Tensor) -> Tensor:
        """This process's rows of a batch, [B, ...], on the device (on the CPU: no copy)."""
        return part.to(self.device)

    def rows(self, table: Tensor) -> Callable[[int], Tensor]:
        """A function that returns row k of `table` [N, B] (CPU) on the device; never blocks."""
        return table.to(self.device).__getitem__

    def uploads(self, slots: Tensor) -> "Uploads":
        """An uploader of parts of `slots`, memory that is reused."""
        return Uploads(self)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU, unaffected by later steps. Blocks."""
        return [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def peak_bytes(self) -> int | None:
        """Peak memory of tensors; None if the device does not count it."""
        return None


class Uploads:
    """Moves batches to a device from memory that is reused when a copy is done."""

    def __init__(self, to: Device) -> None:
        self.to = to

    def begin(self, *parts: Tensor) -> tuple[list[Tensor], Any]:
        """The parts on the device, and an event (`query()`, `synchronize()`) of the copy.

        None: the copy is done, or none is needed.
        """
        return [self.to.upload(part) for part in parts], None

    def close(self) -> None:
        """Wait for copies in flight and release resources. Blocks."""
