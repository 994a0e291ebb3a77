"""Lightning's Trainer on XLA devices (TPUs)."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightship.devices import xla
from lightship.errors import ConfigError
from lightship.extras import INSTALL


def xla_arguments(devices: str, precision: str) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for all chips of this host (or, with "1", one).

    Lightning's XLA strategies spawn a process per chip, after the run has read its data and opened
    its tracking; they do not sync in validation, and support neither URLs of checkpoints nor
    bf16-mixed.

    Raises:
        ConfigError: No PyTorch/XLA, no device, wrong number of devices, or unsupported precision.
    """
    try:
        xla.start(devices)
    except ImportError as error:
        raise ConfigError(
            f"--trainer.accelerator tpu needs PyTorch/XLA ({error}): {INSTALL['tpu']}"
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
        super().__init__(xla.default_device())
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
        xla.cut()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, backward and optimizer step as one program."""
        result = super().optimizer_step(*args, **kwargs)
        xla.cut()
        return result

    def on_validation_start(self) -> None:
        """Keep what callbacks did to the weights out of the first batch's program."""
        xla.cut()

    def on_validation_end(self) -> None:
        """See `on_validation_start`, for the next training batch."""
        xla.cut()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One program per batch, not one for all."""
        result = super().validation_step(*args, **kwargs)
        xla.cut()
        return result

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `validation_step`."""
        result = super().test_step(*args, **kwargs)
        xla.cut()
        return result

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `validation_step`."""
        result = super().predict_step(*args, **kwargs)
        xla.cut()
        return result

    def teardown(self) -> None:
        """Move the module to the CPU, all of it at once."""
        xla.cut()
        super().teardown()
