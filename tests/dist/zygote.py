"""A process with the imports done and nothing used, whose forks become `lightship` commands.

The commands are the real ones, agents and workers with all that they do to each other; only the
seconds of importing are spent once. An agent's workers are forked from the agent, as its children.

    python -m tests.dist.zygote     # a JSON request a line in, the pid of its process a line out
"""

import atexit
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

# All that the commands import.
import lightship.commands.evaluate
import lightship.commands.fit
import lightship.commands.predict
import lightship.distributed.comm
import lightship.distributed.elastic_agent  # noqa: F401
from lightship import cli

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ForkedPopen:
    """What torch's agent uses of subprocess.Popen, by fork instead of exec."""

    def __init__(self, arguments: Any, env: dict[str, str], stdout: Any, stderr: Any) -> None:
        assert arguments[1:3] == ("-m", "lightship")
        files = [None if file is None else file.fileno() for file in (stdout, stderr)]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become(list(arguments[3:]), env, files)

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


def become(arguments: list[str], env: dict[str, str], files: list[int | None]) -> None:
    """Be `python -m lightship arguments`, and end as it does."""
    code = 1
    try:
        os.setsid()
        for number in _SIGNALS:  # as exec would
            signal.signal(number, signal.SIG_DFL)
        logging.getLogger("lightship").handlers.clear()
        for number, file in enumerate(files, 1):
            if file is not None:
                os.dup2(file, number)
        os.environ.clear()
        os.environ.update(env)
        torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
        if "RANK" in env:
            Path(env["TEST_FOLDER"], f"pid-{env['RANK']}").write_text(str(os.getpid()))
        else:  # what an agent does to its modules, its forks inherit
            module, _, name = env["TEST_HOOK"].partition(":")
            getattr(importlib.import_module(module), name)()
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    subprocess_handler.SubprocessHandler._popen = lambda self, args, env: ForkedPopen(
        args, env, self._stdout, self._stderr
    )
    running: dict[int, str] = {}
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:
            line = os.read(0, 1 << 20)
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                become(request["arguments"], request["env"], [log, log])
            running[pid] = request["status"]
            print(pid, flush=True)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                path = Path(running.pop(pid))
                path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    main()
