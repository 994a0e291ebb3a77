"""The rows of the table: every check, what its failure means and how it is mended."""

import time
from collections.abc import Sequence
from concurrent.futures import wait

from lightship import storage
from lightship.doctor import (
    container,
    output,
    processes,
    python_and_torch,
    rendezvous,
    tracking_key,
)
from lightship.doctor.asked import Asked
from lightship.doctor.check import Check, Finding, in_daemon, skipped
from lightship.errors import LightshipError, TimeoutExpired

_LATEST_S = 20.0
"""The last deadline of all: with Python's start and end the doctor stays below 30 s."""
_MEND_REMOTE_DATA = (
    "correct --data.root, and give the pod's identity, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
    "and AWS_ENDPOINT_URL, the right to list and read there"
)
_MEND_LOCAL_DATA = (
    "correct --data.root (a relative path starts at the working directory), in a container mount "
    "the folder, or mend the file it names"
)
_REACH = (
    "correct the address (AWS_ENDPOINT_URL), and let requests through firewall, NetworkPolicy and "
    "proxy to the storage"
)
_TRIED_S, _DATA_SET_KNOWN_S = 9.0, 18.0
"""How long the check of the data set waits for the trial, and when it ends."""
_NEED_KNOWN_S = 16.0
"""How long the check of the data waits for how fast the net trains: a slow net is no slow data."""


class Examination(Asked):
    """The checks of one command."""

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
                _LATEST_S,
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
                _LATEST_S,
                needs_imports=False,
            ),
            Check(
                "GPU driver",
                lambda: python_and_torch.driver_here(trainer.accelerator),
                "no GPU can be used",
                "see whether nvidia-smi answers; restart the node's driver",
                _LATEST_S,
            ),
            Check(
                "GPUs",
                lambda: processes.gpus_for_processes(config),
                "a fit ends at once with code 78",
                "--trainer.devices auto (and unset PET_NPROC_PER_NODE), or ask for more GPUs: "
                "docker run --gpus all, in Kubernetes resources.limits nvidia.com/gpu",
                _LATEST_S,
            ),
            Check(
                "CPU",
                self._cpu,
                "how many cores there are is not known",
                "see imports",
                _LATEST_S,
            ),
            Check(
                "memory limit",
                self._memory_limit,
                "how much memory there is is not known",
                "see imports",
                _LATEST_S,
            ),
            Check(
                "/dev/shm",
                self._shared_memory,
                "NCCL ends with a bus error in its first exchange",
                "docker run --shm-size=1g, in Kubernetes an emptyDir of medium Memory at /dev/shm",
                _LATEST_S,
            ),
            Check(
                "rendezvous",
                self._rendezvous,
                "the nodes do not find each other",
                "set PET_NNODES and PET_RDZV_ENDPOINT=HOST:PORT of node 0, the same on all nodes",
                _LATEST_S,
            ),
            Check(
                "all-reduce", self.exchanged, "the first step would hang", "see NCCL_DEBUG=INFO", 24
            ),
            Check(
                "data",
                self._data,
                "a fit ends before its first step",
                _MEND_REMOTE_DATA if storage.is_remote(config.data.root) else _MEND_LOCAL_DATA,
                _LATEST_S,
            ),
            Check(
                "data set",
                self._data_set,
                "a fit ends with 65",
                "mend the data as told, or correct --data.root",
                _LATEST_S,
                "skipped",
            ),
            Check(
                "output",
                lambda: output.writable(url),
                "a fit ends before its first step",
                f"{_REACH} at --run.output",
                needs_imports=False,
            ),
            Check(
                "run at output",
                lambda: output.run_there(config),
                "a fit ends at once with code 78",
                "give another --run.output, or the settings of the run that is there",
                _LATEST_S,
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
                lambda: tracking_key.wandb(config.run),
                "a fit ends at once with code 78",
                "correct the WANDB_* variable, pip install wandb, or say --run.tracking none",
                _LATEST_S,
                "warn",
            ),
            Check(
                "model memory",
                self._model_memory,
                "a fit ends before its first step",
                "change --model.net or --data.image_size_px as told",
                _LATEST_S,
                "warn",
            ),
            Check(
                "cache disk",
                self._disk,
                "the archive cannot be fetched",
                "correct --data.root",
                _LATEST_S,
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

    def _data(self) -> Finding:
        from lightship.distributed import comm
        from lightship.doctor.data_speed import feed

        try:
            first, speeds = self.first(), self.speeds()
        except TimeoutExpired as error:
            return Finding("fail", str(error), "a fit ends with 74", f"{_REACH} at --data.root")
        count = self._processes_or_one()

        def needed_per_s() -> float | None:
            if self.config.trainer.is_on_tpu:
                return None
            trying = in_daemon(self.trial)
            left_s = self.begun_s + _NEED_KNOWN_S - time.monotonic()
            if not wait([trying], max(0.0, left_s)).done or trying.exception() is not None:
                return None  # the check of the model's memory tells of it
            trial = trying.result()
            if trial is None or trial.images_per_s is None:
                return None
            # On a CPU the processes share the cores that one has had alone.
            return trial.images_per_s * (count if self.on_gpus else 1)

        threads = self.config.data.decode_threads * count or comm.cores()
        return feed(self.config.data, first, speeds, threads, needed_per_s)

    def _data_set(self) -> Finding:
        from lightship.doctor.data_set import examine

        try:
            first = self.first()
            self.speeds()  # which a listing beside it would slow, as it would the trial
        except LightshipError:
            return skipped("see data")
        if first.is_read_whole:
            return skipped(f"{first.told}: known once a fit has read it")
        wait([in_daemon(self.trial)], max(0.0, self.begun_s + _TRIED_S - time.monotonic()))
        return examine(self.config.data, self.begun_s + _DATA_SET_KNOWN_S)

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

    def _disk(self) -> Finding:
        from lightship.doctor import disk

        return disk.cache(self.config.data)
