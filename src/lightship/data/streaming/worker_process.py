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
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lightship.data.streaming.messages import Task

_LEAVE_S = 5.0
_SETTINGS = re.compile(
    r"AWS_|FSSPEC_|LIGHTSHIP_(STORAGE|S3|CACHE)|XDG_CACHE_HOME|HOME$|GOOGLE_|GCS|AZURE_|HF_|"
    r"SSL_CERT|REQUESTS_CA|\w*_proxy$|\w*_PROXY$"
)
"""Variables that a storage's client may read."""


class SharedSlots:
    """Memory that this process and its worker share.

    Not POSIX shared memory: that is bounded by /dev/shm (64 MB in a container) and outlives a kill.

    Args:
        shape: Of the array.
        descriptor: A file descriptor of the memory; None: make it.
    """

    def __init__(self, shape: tuple[int, ...], descriptor: int | None = None) -> None:
        size_bytes = int(np.prod(shape))
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, size_bytes)
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, size_bytes)
        self.pixels = np.frombuffer(memory, dtype=np.uint8).reshape(shape)

    def close(self) -> None:
        """Close the descriptor; the mapping lives as long as `pixels`."""
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lightship-batches")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _settings() -> tuple[dict[str, str], str]:
    """What a worker inherits at its start: the storage's variables and the working directory."""
    variables = {name: value for name, value in os.environ.items() if _SETTINGS.match(name)}
    try:
        return variables, os.getcwd()
    except FileNotFoundError:  # deleted: only absolute paths and URLs can be read
        return variables, "/"


class Worker:
    """This rank's worker process, started once; see worker.py.

    It is started afresh, not forked: the threads, sockets and GPU of this process would not survive
    that; and in a session of its own, for a launcher signals the whole group, but whether to stop
    is for the processes that train to decide. It ends when this process does, however that ends.
    """

    _running: "Worker | None" = None

    def __init__(self, root: str) -> None:
        self.settings, self.open_tasks = _settings(), 0
        self.control, theirs = socket.socketpair()
        code = f"from lightship.data.streaming.worker import main; main({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            cwd=self.settings[1],  # MKL does not load in a deleted directory
        )
        self.tasks: Connection = Connection(os.dup(self.control.fileno()))
        self.tasks.send(root)  # not an argument: it may hold credentials, and `ps` shows those
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
        if worker is None or worker.process.poll() is not None or worker.settings != _settings():
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
        """Hand over a task: where word of its batches comes from, and where their pixels are."""
        ours, theirs = multiprocessing.Pipe()
        slots = SharedSlots(task.shape)
        try:
            self.tasks.send(task)
            socket.send_fds(self.control, [b"."], [theirs.fileno(), slots.descriptor])
        except ConnectionError:
            raise RuntimeError(self.how_it_ended()) from None
        self.open_tasks += 1
        theirs.close()
        slots.close()
        return ours, slots

    def task_is_over(self) -> None:
        """Count a task that was begun as ended."""
        self.open_tasks -= 1
        if not self.open_tasks and self is not Worker._running:
            self.end()

    def how_it_ended(self) -> str:
        """How a dead worker ended, for an error message."""
        try:
            code = self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "the data worker abandoned a task"
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        hint = " (for lack of memory?)" if code == -signal.SIGKILL else ""
        return f"the data worker {end}{hint}"
