"""Differences between CPU, CUDA and XLA (TPUs): the only file that checks the kind of device.

XLA is lazy: operations are recorded, and compiled and run at a cut (`torch_xla.sync`). So every
recorded graph must equal an earlier one (static shapes, no step-dependent constants), and the cuts
are at the same places in every step. One process drives all chips of a host: tensors are those of
the global batch; the compiler shards them and inserts the reductions (GSPMD, Xu et al. 2021,
arXiv:2105.04663). Outside this file, only batch sizes depend on the number of chips.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lightship.errors import ConfigError


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


class XlaDevice(Device):
    """The TPU chips of this host as one device, or one of XLA's other runtimes."""

    widest_float = torch.float32  # a TPU emulates float64
    compiles_steps = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.mesh = _mesh()
        self.chips = _runtime().addressable_runtime_device_count() if self.mesh else 1

    def seed(self, key: int) -> None:
        """Seed the generators of the CPU and the device, whose seed is not compiled in."""
        import torch_xla

        super().seed(key)
        torch_xla._XLAC._xla_set_rng_seed(key, str(self.device))

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
        spread = xs.ShardingSpec(self.mesh, axes, minibatch=_runtime().process_count() > 1)
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
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type in ("cuda", "xla")


# Lightning on XLA


def xla_arguments(devices: str, precision: str) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for all chips of this host (or, with "1", one).

    Lightning's XLA strategies spawn a process per chip, after the run has read its data and opened
    its tracking; they do not sync in validation, and support neither URLs of checkpoints nor
    bf16-mixed.

    Raises:
        ConfigError: No PyTorch/XLA, no device, wrong number of devices, or unsupported precision.
    """
    try:
        _start_xla(devices)
    except ImportError as error:
        raise ConfigError(
            f"--trainer.accelerator tpu needs PyTorch/XLA ({error}): pip install lightship[tpu]"
        ) from None
    plugins: dict[str, list[Precision]] = {
        "32-true": [],
        "bf16-mixed": [MixedPrecision("bf16-mixed", "xla")],
        "bf16-true": [HalfPrecision("bf16-true")],
    }
    if precision not in plugins:
        raise ConfigError(
            f"--trainer.precision {precision}: an XLA device takes {', '.join(plugins)}"
        )
    return {
        "accelerator": XlaAccelerator(),
        "strategy": XlaStrategy(),
        "devices": 1,
        "plugins": plugins[precision],
        "inference_mode": False,  # some of XLA's operations refuse inference tensors; no_grad does
    }


def _start_xla(devices: str) -> None:
    # By default 0 and 1 are compiled in while other numbers are data: a learning rate that reaches
    # one of them would recompile the step.
    os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
    runtime = _runtime()
    try:
        there = runtime.addressable_runtime_device_count()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--trainer.accelerator tpu: PJRT_DEVICE={runtime.device_type()} has no device "
            f"({reason})"
        ) from None
    hosts = dist.get_world_size() if dist.is_initialized() else 1
    choices = ["auto", str(there)] if hosts > 1 else ["auto", "1", str(there)]
    if devices not in choices:
        raise ConfigError(
            f"--trainer.devices {devices}: each of {hosts} hosts has {there} XLA devices; give "
            f"{' or '.join(choices)}"
        )
    if runtime.process_count() != hosts:
        raise ConfigError(
            f"the job has {hosts} hosts, but the XLA runtime sees {runtime.process_count()}: "
            "TPU_WORKER_HOSTNAMES and TPU_WORKER_ID do not match the slice"
        )
    if (devices != "1" and there > 1) or hosts > 1:
        runtime.use_spmd()


def _runtime() -> Any:
    import torch_xla.runtime

    return torch_xla.runtime


@functools.cache
def _mesh() -> Any:
    """A 1-D mesh of all chips of the job; None for a single chip."""
    import torch_xla.distributed.spmd as xs

    return xs.get_1d_mesh("data") if _runtime().is_spmd() else None


class XlaAccelerator(Accelerator):
    """Lightning's accelerator for XLA devices."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None: reading them would synchronize with the device."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Unchanged."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One device that stands for all chips."""
        return [torch.device("xla", 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One device that stands for all chips."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """True: `xla_arguments` has checked it."""
        return True

    @staticmethod
    def name() -> str:
        """Lightning's name for XLA devices."""
        return "tpu"


class XlaStrategy(SingleDeviceStrategy):
    """One process per host; a tensor on the device is replicated or sharded over all hosts.

    Cuts the recorded graph before each training batch, so that augmentation is one program, after
    each optimizer step and after each evaluation batch.
    """

    strategy_name = "lightship_xla"

    def __init__(self) -> None:
        import torch_xla

        super().__init__(torch_xla.device())
        if dist.is_initialized():
            self.world_size, self.global_rank = dist.get_world_size(), dist.get_rank()

    @property
    def is_global_zero(self) -> bool:
        """Whether this host writes and logs."""
        return self.global_rank == 0

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other hosts."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of host `src`."""
        if self.world_size == 1:
            return obj
        told = [obj]
        dist.broadcast_object_list(told, src)
        return told[0]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Cut after the augmentation."""
        cut()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, backward and optimizer step as one program."""
        result = super().optimizer_step(*args, **kwargs)
        cut()
        return result

    def on_validation_start(self) -> None:
        """Keep what callbacks did to the weights out of the first batch's program."""
        cut()

    def on_validation_end(self) -> None:
        """See `on_validation_start`, for the next training batch."""
        cut()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One program per batch, not one for all."""
        result = super().validation_step(*args, **kwargs)
        cut()
        return result

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `validation_step`."""
        result = super().test_step(*args, **kwargs)
        cut()
        return result

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `validation_step`."""
        result = super().predict_step(*args, **kwargs)
        cut()
        return result

    def teardown(self) -> None:
        """Move the module to the CPU, all of it at once."""
        cut()
        super().teardown()


def cut() -> None:
    """Compile and run the recorded graph; does not block."""
    import torch_xla

    torch_xla.sync()
