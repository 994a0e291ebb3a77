"""Ranks that torch's agent forks from itself: without the seconds of an interpreter's imports.

What a started rank shows to others (its command line, its first environment) is not tested by this:
tests/e2e/test_untrusted_network.py and test_secrets_stay_secret.py start theirs as a user does.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.support.warm import become

VARIABLE = "LIGHTSHIP_TEST_FORK_RANKS"
"""Set for commands of `warm` and `forked` whose ranks are to be forks."""


def fork_ranks(command: Callable[[list[str]], int]) -> None:
    """Have this process's agent fork its ranks; `command` gets the arguments, gives the code."""
    subprocess_handler.SubprocessHandler._popen = lambda self, arguments, env: ForkedPopen(
        command, arguments, env, self._stdout, self._stderr
    )


def run_rank(arguments: list[str]) -> int:
    """`python -m lightship arguments`, in a process group of its own."""
    import torch

    from lightship import cli

    os.setsid()
    logging.getLogger("lightship").handlers.clear()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.argv = ["lightship", *arguments]
    return cli.main()


class ForkedPopen:
    """What torch's agent uses of subprocess.Popen, by fork instead of exec."""

    def __init__(
        self,
        command: Callable[[list[str]], int],
        arguments: Any,
        env: dict[str, str],
        stdout: Any,
        stderr: Any,
    ) -> None:
        assert arguments[1:4] == ("-P", "-m", "lightship")
        files = {n: file.fileno() for n, file in ((1, stdout), (2, stderr)) if file is not None}
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become(partial(command, list(arguments[4:])), env, files)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("lightship", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode
