"""All checks of a command, put together and run: the one file that knows what each needs."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from lightship import storage
from lightship.cli import Command
from lightship.doctor import (
    collectives,
    container,
    output,
    printing,
    processes,
    python_and_torch,
    rendezvous,
    tracking_key,
)
from lightship.doctor.check import Check, Finding, Once, in_daemon, run, skipped
from lightship.exits import ConfigError, LightshipError

if TYPE_CHECKING:
    from lightship.doctor.first_samples import FirstSamples
    from lightship.doctor.trial import Trial

_STORAGE_DEADLINE_S = 8.0
"""Bound of each call of the storage here, where a fit tries for two minutes."""
_GUESSED_CLASSES = 1000
_MEND_REMOTE_DATA = (
    "correct --data.root, and give the pod's identity, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
    "and AWS_ENDPOINT_URL, the right to list and read there"
)
_MEND_LOCAL_DATA = (
    "correct --data.root (a relative path starts at the working directory), in a container mount "
    "the folder, or mend the file it names"
)
_NEED_KNOWN_S = 20.0
"""How long the check of the data waits for how fast the net trains: a slow net is no slow data."""


def examine(command: Command, is_worker: bool) -> None:
    """Check all that can be checked without training, and print it as a table. Blocks, under 30 s.

    Args:
        command: `lightship doctor` with the flags of a fit.
        is_worker: Whether a launcher started this process as one of several. Then the first of each
            node checks all, and the others take part in the exchange alone.

    Raises:
        ConfigError: A check failed; its text is the first failure's.
    """
    asked = Examination(command, is_worker)
    checks = asked.checks()
    if is_worker and os.environ["LOCAL_RANK"] != "0":
        checks = [check for check in checks if check.name == "all-reduce"]
        opened: AbstractContextManager[printing.Show] = nullcontext(lambda name, finding: None)
    else:
        names = [check.name for check in checks]
        opened = printing.table(names, command.config.run.log_format)
    first: tuple[str, Finding] | None = None
    with _storage_deadline(), opened as show:
        for check, told in run(checks, asked.imported):
            finding = replace(told, found=storage.redact(told.found))
            show(check.name, finding)
            if finding.status == "fail" and first is None:
                first = check.name, finding
    if first is not None:
        name, finding = first
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        raise ConfigError(" ".join(f"{name}: {finding.found}{fix}".split()))


def _imports() -> None:
    """What the checks import, once, on one thread."""
    import logging

    import lightship.agent
    import lightship.launch
    import lightship.run  # noqa: F401 (all of a fit)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@contextmanager
def _storage_deadline() -> Iterator[None]:
    """Storage that gives up sooner, unless the environment says something."""
    name = "LIGHTSHIP_STORAGE_DEADLINE_S"
    is_ours = name not in os.environ
    os.environ.setdefault(name, f"{_STORAGE_DEADLINE_S:g}")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[name]


class Examination:
    """The checks of one command, and what several of them need.

    Args:
        command: What was asked for.
        is_worker: As for `examine`.
    """

    def __init__(self, command: Command, is_worker: bool) -> None:
        self.config, self.wrong, self.is_worker = command.config, command.wrong, is_worker
        self.begun_s = time.monotonic()
        self.imported = Once(_imports)
        self.first = Once(self._first_samples)
        self.trial = Once(self._trial)
        self.exchanged = Once(self._exchange)

    def checks(self) -> Sequence[Check]:
        """The rows of the table. Those that need a valid configuration say so where it is not."""
        config, url = self.config, str(self.config.run.output)
        trainer = config.trainer
        asked = [
            Check(
                "configuration",
                self._configuration,
                "a fit may end at once",
                "see what is late below",
                25,
                "warn",
                needs_imports=not self.wrong,
            ),
            Check(
                "packages",
                python_and_torch.packages,
                "nothing can be trained",
                "pip install lightship in a new environment",
                needs_imports=False,
            ),
            Check(
                "imports",
                self._imports,
                "nothing can be trained",
                "pip install lightship in a new environment, on a local disk",
                25,
                needs_imports=False,
            ),
            Check(
                "GPU driver",
                lambda: python_and_torch.driver_here(trainer.accelerator),
                "no GPU can be used",
                "see whether nvidia-smi answers; restart the node's driver",
                20,
            ),
            Check(
                "GPUs",
                lambda: processes.gpus_for_processes(config),
                "a fit ends at once with code 78",
                "--trainer.devices auto (and unset PET_NPROC_PER_NODE), or ask for more GPUs: "
                "docker run --gpus all, in Kubernetes resources.limits nvidia.com/gpu",
                20,
            ),
            Check(
                "CPU",
                self._cpu,
                "how many cores there are is not known",
                "see imports",
                20,
            ),
            Check(
                "memory limit",
                self._memory_limit,
                "how much memory there is is not known",
                "see imports",
                20,
            ),
            Check(
                "/dev/shm",
                self._shared_memory,
                "NCCL ends with a bus error in its first exchange",
                "docker run --shm-size=1g, in Kubernetes an emptyDir of medium Memory at /dev/shm",
                20,
            ),
            Check(
                "rendezvous",
                self._rendezvous,
                "the nodes do not find each other",
                "set PET_NNODES and PET_RDZV_ENDPOINT=HOST:PORT of node 0, the same on all nodes",
                20,
            ),
            Check(
                "all-reduce", self.exchanged, "the first step would hang", "see NCCL_DEBUG=INFO", 24
            ),
            Check(
                "data",
                self._data,
                "a fit ends before its first step",
                _MEND_REMOTE_DATA if storage.is_remote(config.data.root) else _MEND_LOCAL_DATA,
                25,
            ),
            Check(
                "output",
                lambda: output.writable(url),
                "a fit ends before its first step",
                "see that the storage at --run.output (AWS_ENDPOINT_URL) can be reached from here: "
                "address, firewall, NetworkPolicy, proxy",
                needs_imports=False,
            ),
            Check(
                "run at output",
                lambda: output.run_there(config),
                "a fit ends at once with code 78",
                "give another --run.output, or the settings of the run that is there",
                20,
            ),
            Check(
                "clock",
                lambda: output.clock(url),
                "S3 refuses requests signed 15 minutes apart",
                "see output",
                if_late="skipped",
                needs_imports=False,
            ),
            Check(
                "W&B key",
                lambda: tracking_key.wandb_key(config.run.tracking),
                "a fit ends at once with code 78",
                "correct the WANDB_* variable, pip install wandb, or say --run.tracking none",
                20,
                "warn",
            ),
            Check(
                "model memory",
                self._model_memory,
                "a fit ends before its first step",
                "change --model.net or --data.image_size_px as told",
                25,
                "warn",
            ),
            Check(
                "cache disk",
                self._disk,
                "the archive cannot be fetched",
                "correct --data.root",
                20,
            ),
        ]
        if not self.wrong:
            return asked
        unknown = skipped("the configuration is not valid")
        return [
            check
            if check.name in ("configuration", "packages", "imports", "GPU driver")
            else Check(check.name, lambda: unknown, "", "", needs_imports=False)
            for check in asked
        ]

    @cached_property
    def processes(self) -> int:
        """Processes of the fit on this node. Needs the imports. Raises ConfigError."""
        from lightship import launch

        if self.is_worker:
            return int(os.environ["LOCAL_WORLD_SIZE"])
        return 1 if self.config.trainer.is_on_tpu else launch.processes_here(self.config)

    @cached_property
    def on_gpus(self) -> bool:
        """Whether each of them drives a GPU. Needs the imports."""
        from lightship import launch

        return launch.is_on_gpus(self.config.trainer.accelerator)

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

    def _imports(self) -> Finding:
        self.imported()
        return Finding("ok", "all that a fit imports", "the packages load")

    def _configuration(self) -> Finding:
        from lightship.doctor.configuration import valid

        if self.wrong:
            return valid(self.config, self.wrong, 1, None, False)
        size_px = self.config.data.image_size_px
        return valid(self.config, "", self._ranks(), size_px, not self.is_worker)

    def _cpu(self) -> Finding:
        threads = self.config.data.decode_threads
        return container.cpu(container.read_limits(), self._processes_or_one(), threads)

    def _memory_limit(self) -> Finding:
        return container.memory(container.read_limits(), self._processes_or_one())

    def _shared_memory(self) -> Finding:
        return container.shared(self._processes_or_one() if self.on_gpus else 0)

    def _rendezvous(self) -> Finding:
        if self.is_worker:
            return rendezvous.under_a_launcher()
        return rendezvous.meet(rendezvous.find_meeting())

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

    def _trial(self) -> "Trial | None":
        import torch

        from lightship.doctor.trial import try_steps

        size_px, classes = self.config.data.image_size_px, None
        try:
            first = self.first()
            size_px, classes = size_px or first.size_px(), first.classes
        except LightshipError:
            if size_px is None:
                return None  # the check of the data tells why
        if size_px is None:
            return None
        self.exchanged()  # speeds are measured when the exchange's processes are gone
        device = torch.device("cuda", 0) if self.on_gpus else torch.device("cpu")
        return try_steps(self.config, size_px, classes or _GUESSED_CLASSES, device)

    def _data(self) -> Finding:
        from lightship import ranks
        from lightship.doctor.data_speed import feed

        first = self.first()
        count = self._processes_or_one()

        def needed_per_s() -> float | None:
            trying = in_daemon(self.trial)
            left_s = self.begun_s + _NEED_KNOWN_S - time.monotonic()
            if not wait([trying], max(0.0, left_s)).done or isinstance(
                trying.exception(), ConfigError
            ):
                return None  # the check of the model tells of it
            trial = trying.result()
            if trial is None or trial.images_per_s is None:
                return None
            # On a CPU the processes share the cores that one has had alone.
            return trial.images_per_s * (count if self.on_gpus else 1)

        threads = self.config.data.decode_threads * count or ranks.cores()
        return feed(self.config.data, first, threads, needed_per_s)

    def _model_memory(self) -> Finding:
        import torch

        from lightship.doctor.memory import Room, estimate

        if self.config.trainer.is_on_tpu:
            return skipped("--trainer.accelerator tpu: XLA plans the chips' memory by itself")
        trial = self.trial()
        if trial is None:
            return skipped("the images' size is not known, see data")
        gpu = torch.cuda.get_device_properties(0).total_memory if self.on_gpus else None
        host = container.usable_memory_bytes(container.read_limits())
        room = Room(self._processes_or_one(), self._ranks(), host, gpu)
        return estimate(self.config, trial, room, self._data_bytes())

    def _data_bytes(self) -> int:
        """What a process holds of the data where training runs; 0 where that is not known."""
        data = self.config.data
        is_streamed = data.mode == "streaming" or bool(data.crop_min_area)
        try:
            first = self.first()
        except LightshipError:
            return 0
        size_px = data.image_size_px or first.size_px()
        decoded = 3 * size_px**2 * first.count if size_px and first.count else 0
        if is_streamed or decoded > data.resident_gib * 2**30:
            return 0 if self.on_gpus else int(data.prefetch_gib * 2**30)
        return decoded

    def _disk(self) -> Finding:
        from lightship.doctor import disk

        return disk.cache(self.config.data)
