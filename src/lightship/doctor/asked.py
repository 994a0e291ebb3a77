"""What a command asks for, and what several of its checks need to know, each found out once."""

import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from lightship.config import Config
from lightship.doctor import collectives, rendezvous
from lightship.doctor.check import Finding, Once, skipped
from lightship.errors import ConfigError, LightshipError

if TYPE_CHECKING:
    from lightship.doctor.data_speed import Speeds
    from lightship.doctor.dry_run import Trial
    from lightship.doctor.first_samples import FirstSamples

_GUESSED_CLASSES = 1000


class Asked:
    """The facts of one examination; all that is slow is a Once and blocks who asks first.

    Args:
        config: Settings of the fit that is asked about.
        wrong: Why they are not valid; empty if they are.
        is_worker: Whether a launcher started this process as one of several.
        imports: Imports all that a fit imports.
    """

    def __init__(
        self, config: Config, wrong: str, is_worker: bool, imports: Callable[[], None]
    ) -> None:
        self.config, self.wrong, self.is_worker = config, wrong, is_worker
        self.begun_s = time.monotonic()
        self.imported = Once(imports)
        self.first = Once(self._first_samples)
        self.speeds = Once(self._speeds)
        self.trial = Once(self._trial)
        self.exchanged = Once(self._exchange)

    @cached_property
    def processes(self) -> int:
        """Processes of the fit on this node. Needs the imports. Raises ConfigError."""
        from lightship.distributed import launcher

        if self.is_worker:
            return int(os.environ["LOCAL_WORLD_SIZE"])
        return 1 if self.config.trainer.is_on_tpu else launcher.processes_here(self.config.trainer)

    @cached_property
    def on_gpus(self) -> bool:
        """Whether each of them drives a GPU. Needs the imports."""
        from lightship.distributed import launcher

        return launcher.is_on_gpus(self.config.trainer.accelerator)

    def _ranks(self) -> int:
        """Processes of the whole job."""
        if self.is_worker:
            return int(os.environ["WORLD_SIZE"])
        meeting = rendezvous.find_meeting()
        return self.processes * (meeting.nodes if meeting else 1)

    def _processes_or_one(self) -> int:
        try:
            return self.processes
        except ConfigError:
            return 1  # the check of GPUs tells of it

    def _exchange(self) -> Finding:
        if self.config.trainer.is_on_tpu:
            return skipped("--trainer.accelerator tpu: XLA exchanges by itself")
        if self.is_worker:
            return collectives.under_a_launcher(self.on_gpus)
        try:
            count = self.processes
        except ConfigError as error:
            return skipped(f"how many processes there are is not clear ({error})")
        return collectives.on_this_node(count, self.on_gpus)

    def _first_samples(self) -> "FirstSamples":
        from lightship.doctor.first_samples import find_first_samples

        return find_first_samples(self.config.data)

    def _speeds(self) -> "Speeds":
        from lightship.doctor.data_speed import measure

        return measure(self.config.data, self.first())

    def _trial(self) -> "Trial | None":
        import torch

        from lightship.doctor.dry_run import try_steps

        size_px, classes = self.config.data.image_size_px, None
        try:
            first = self.first()
            size_px, classes = first.size_px(self.config.data), first.classes
        except LightshipError:
            if size_px is None:
                return None  # the check of the data tells why
        if size_px is None:
            return None
        self.exchanged()  # speeds are measured when the exchange's processes are gone
        device = torch.device("cuda", 0) if self.on_gpus else torch.device("cpu")
        return try_steps(self.config, size_px, classes or _GUESSED_CLASSES, device)

    def _data_bytes(self) -> int:
        """What a process holds of the data where training runs; 0 where that is not known."""
        data = self.config.data
        is_streamed = data.mode == "streaming" or bool(data.crop_min_area)
        try:
            first = self.first()
            size_px = first.size_px(data)
        except LightshipError:
            return 0
        decoded = 3 * size_px**2 * first.count if size_px and first.count else 0
        if is_streamed or decoded > data.resident_gib * 2**30:
            return 0 if self.on_gpus else int(data.prefetch_gib * 2**30)
        return decoded
