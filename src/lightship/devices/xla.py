"""XLA devices (TPUs): the one module that imports torch_xla.

XLA is lazy: operations are recorded, and compiled and run at a cut (`torch_xla.sync`). So every
recorded graph must equal an earlier one (static shapes, no step-dependent constants), and the cuts
are at the same places in every step. One process drives all chips of a host: tensors are those of
the global batch; the compiler shards them and inserts the reductions (GSPMD, Xu et al. 2021,
arXiv:2105.04663). Elsewhere, only batch sizes depend on the number of chips.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightship.devices.device import Device
from lightship.errors import ConfigError


class XlaDevice(Device):
    """The TPU chips of this host as one device, or one of XLA's other runtimes."""

    widest_float = torch.float32  # a TPU emulates float64
    compiles_steps = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.mesh = _mesh()
        self.chips = runtime().addressable_runtime_device_count() if self.mesh else 1

    def seed(self, key: int) -> None:
        """Seed the generators of the CPU and the device, whose seed is not compiled in."""
        import torch_xla.core.xla_model as xm

        super().seed(key)
        xm.set_rng_state(key, str(self.device))

    def rows(self, table: Tensor) -> Callable[[int], Tensor]:
        """Each row is uploaded: an index into a table would be compiled in."""
        return lambda index: self.upload(table[index])

    def upload(self, part: Tensor) -> Tensor:
        """Sharded over the chips; XLA copies first, then sends during the step."""
        import torch_xla.core.xla_model as xm
        import torch_xla.distributed.spmd as xs

        if self.mesh is None:
            return part.to(self.device)
        axes = ("data", *[None] * (part.ndim - 1))
        spread = xs.ShardingSpec(self.mesh, axes, minibatch=runtime().process_count() > 1)
        return xm.send_cpu_data_to_device([part], self.device, input_sharding=spread)[0]

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Fetched together: one by one, each would synchronize with the device."""
        import torch_xla

        of_device = [tensor for tensor in tensors if tensor.device.type == "xla"]
        fetched = iter(torch_xla._XLAC._xla_get_cpu_tensors([t.detach() for t in of_device]))
        return [
            next(fetched) if tensor.device.type == "xla" else tensor.detach().clone()
            for tensor in tensors
        ]


def start(devices: str) -> None:
    """Start the XLA runtime on all chips of this host (or, with "1", one).

    Raises:
        ImportError: No PyTorch/XLA.
        ConfigError: No device, or wrong number of devices.
    """
    # By default 0 and 1 are compiled in while other numbers are data: a learning rate that reaches
    # one of them would recompile the step.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    xla = runtime()
    try:
        there = xla.addressable_runtime_device_count()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--trainer.accelerator tpu: PJRT_DEVICE={xla.device_type()} has no device ({reason})"
        ) from None
    hosts = dist.get_world_size() if dist.is_initialized() else 1
    choices = ["auto", str(there)] if hosts > 1 else ["auto", "1", str(there)]
    if devices not in choices:
        raise ConfigError(
            f"--trainer.devices {devices}: each of {hosts} hosts has {there} XLA devices; give "
            f"{' or '.join(choices)}"
        )
    if xla.process_count() != hosts:
        raise ConfigError(
            f"the job has {hosts} hosts, but the XLA runtime sees {xla.process_count()}: "
            "TPU_WORKER_HOSTNAMES and TPU_WORKER_ID do not match the slice"
        )
    if (devices != "1" and there > 1) or hosts > 1:
        xla.use_spmd()


def runtime() -> Any:
    """The module `torch_xla.runtime`."""
    import torch_xla.runtime

    return torch_xla.runtime


@functools.cache
def _mesh() -> Any:
    """A 1-D mesh of all chips of the job; None for a single chip."""
    import torch_xla.distributed.spmd as xs

    return xs.get_1d_mesh("data") if runtime().is_spmd() else None


def cut() -> None:
    """Compile and run the recorded graph; does not block."""
    import torch_xla

    torch_xla.sync()


def default_device() -> torch.device:
    """The device that stands for all chips."""
    import torch_xla

    return torch_xla.device()
