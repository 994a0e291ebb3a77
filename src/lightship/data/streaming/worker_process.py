"""The data worker's process, from the side of the process that trains.

Imports no torch, so that a command can start the worker before its own imports.
"""

import mmap
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from lightship.console import streams
from lightship.data.streaming import pickle_with_files

if TYPE_CHECKING:
    from lightship.data.streaming.messages import Task

_LEAVE_S = 5.0
IDLE = -1
_SETTINGS = re.compile(
    r"AWS_|BOTO|FSSPEC_|LIGHTSHIP_(STORAGE|S3|CACHE|HTTP)|XDG_CACHE_HOME|HOME$|NETRC$|"
    r"GOOGLE_|GCS|GCE_|GCLOUD_|CLOUDSDK_|STORAGE_EMULATOR_HOST$|AZURE_|IDENTITY_|MSI_|"
    r"OCI_|OSS_|B2_|HADOOP_|CLASSPATH$|JAVA_|ARROW_|KRB5|SSH_AUTH_SOCK$|"
    r"SSL_CERT|REQUESTS_CA|CURL_CA|\w*_proxy$|\w*_PROXY$"
)
"""Variables that a storage's client may read; those of the Hub (HF_) are for hf:// alone."""
_SYSTEM = re.compile(
    r"PATH$|LD_|DYLD_|PYTHON|LANG|LC_|TZ$|TMPDIR$|TEMP$|TMP$|USER$|LOGNAME$|VIRTUAL_ENV$|CONDA_|"
    r"\w*_NUM_THREADS$|OMP_|GOMP_|KMP_|MKL_|MALLOC_|CUDA_|NVIDIA_|TORCH(?!ELASTIC)|PYTORCH_"
)
"""Variables that Python and its libraries may read. The worker decodes what strangers have
made: no secret that it does not need is in its memory."""

_OUT_OF_MEMORY = " (out of memory? lower --data.prefetch_gib or --data.decode_gib)"
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""The worker's own threads share the cores; what they call starts none."""


class SharedSlots:
    """Memory that this process and its worker share.

    Not POSIX shared memory: that is bounded by /dev/shm (64 MB in a container) and outlives a kill.

    Args:
        shape: Of the pixels.
        threads: Of the worker.
        descriptor: A file descriptor of the memory; None: make it.

    Attributes:
        pixels: [slots, B, S, S, 3] uint8.
        decoding: [threads, 2] int64: (epoch, id) of the sample that each thread is decoding, IDLE
            if none. It outlives the worker.
    """

    def __init__(self, shape: tuple[int, ...], threads: int, descriptor: int | None = None) -> None:
        size_bytes, table_bytes = int(np.prod(shape)), 16 * threads
        is_new = descriptor is None
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, size_bytes + table_bytes)
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, size_bytes + table_bytes)
        self.pixels = np.frombuffer(memory, np.uint8, size_bytes).reshape(shape)
        self.decoding = np.frombuffer(memory, np.int64, 2 * threads, size_bytes).reshape(-1, 2)
        if is_new:
            self.decoding[:] = IDLE

    def close(self) -> None:
        """Close the descriptor; the mapping lives as long as `pixels`."""
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lightship-batches")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _variables(pattern: re.Pattern[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if pattern.match(name)}


def _settings(root: str) -> tuple[dict[str, str], str]:
    """What a worker inherits at its start: the storage's variables and the working directory."""
    variables = _variables(_SETTINGS)
    if "hf://" in root:
        variables |= _variables(re.compile("HF_|HUGGING"))
    try:
        return variables, os.getcwd()
    except FileNotFoundError:  # deleted: only absolute paths and URLs can be read
        return variables, "/"


def spawn(code: str, root: str, **more: Any) -> "subprocess.Popen[bytes]":
    """Start a process that decodes images: with none of the secrets that it does not need.

    Args:
        code: What Python runs.
        root: A URL that it will read.
        more: Further arguments of Popen.
    """
    variables, folder = _settings(root)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        start_new_session=True,
        env=_variables(_SYSTEM) | _ONE_THREAD | variables,
        cwd=folder,  # one that is there, so that libraries load
        **more,
    )


class WorkerDied(Exception):
    """The worker's process has ended, or it has abandoned a task.

    Attributes:
        is_killed: Whether a signal has ended it.
    """

    def __init__(self, text: str, is_killed: bool) -> None:
        super().__init__(text)
        self.is_killed = is_killed


class Worker:
    """This rank's worker process, started once; see worker.py.

    It is started afresh, not forked: the threads, sockets and GPU of this process would not survive
    that; and in a session of its own, for a launcher signals the whole group, but whether to stop
    is for the processes that train to decide. It ends when this process does, however that ends.
    """

    _running: "Worker | None" = None

    def __init__(self, root: str) -> None:
        self.settings, self.open_tasks = _settings(root), 0
        self.control, theirs = socket.socketpair()
        code = (
            "from lightship.distributed.libraries import preload; preload(); "
            f"from lightship.data.streaming.worker import main; main({theirs.fileno()})"
        )
        self.process = spawn(code, root, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.tasks: Connection = Connection(os.dup(self.control.fileno()))
        # Not an argument: it may hold credentials, and `ps` shows those.
        self.tasks.send((root, streams.is_json()))
        theirs.close()

    @classmethod
    def start(cls, root: str) -> "Worker":
        """The worker, started if need be. Does not wait for it: its imports go on by themselves.

        Where the storage's settings or the working directory have changed since it was started,
        another one takes its place; the first ends with its last task.

        Args:
            root: A URL that it will read, whose storage's client it makes ready.
        """
        worker = cls._running
        if (
            worker is None
            or worker.process.poll() is not None
            or worker.settings != _settings(root)
        ):
            cls._running = cls(root)
            if worker is not None and not worker.open_tasks:
                worker.end()
        assert cls._running is not None
        return cls._running

    @classmethod
    def stop(cls) -> None:
        """End the worker, if one runs. Blocks a moment."""
        worker, cls._running = cls._running, None
        if worker is not None:
            worker.end()

    def end(self) -> None:
        """End the process, whatever it does. Blocks a moment."""
        self.tasks.close()
        self.control.close()
        try:
            self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:  # frozen
            self.process.kill()
            self.process.wait(_LEAVE_S)

    def begin(self, task: "Task") -> tuple[Connection, SharedSlots]:
        """Hand over a task: where word of its batches comes from, and where their pixels are.

        Raises:
            WorkerDied: See there.
        """
        data, mapped = pickle_with_files.dumps(task)
        ours, theirs = multiprocessing.Pipe()
        slots = SharedSlots(task.shape, task.threads)
        try:
            self.tasks.send_bytes(data)
            handed = [theirs.fileno(), slots.descriptor, *mapped]
            socket.send_fds(self.control, [b"."], handed)
        except ConnectionError:
            raise self.death() from None
        self.open_tasks += 1
        theirs.close()
        slots.close()
        return ours, slots

    def task_is_over(self) -> None:
        """Count a task that was begun as ended."""
        self.open_tasks -= 1
        if not self.open_tasks and self is not Worker._running:
            self.end()

    def death(self) -> WorkerDied:
        """How it ended, where a task's connection has closed. Blocks a moment."""
        try:
            code = self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return WorkerDied("abandoned a task", is_killed=False)
        if code >= 0:
            return WorkerDied(f"ended with {code}", is_killed=False)
        hint = _OUT_OF_MEMORY if code == -signal.SIGKILL else ""
        return WorkerDied(f"was killed by {signal.Signals(-code).name}{hint}", is_killed=True)
