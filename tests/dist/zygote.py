"""A process with the imports done and nothing used, whose forks become `lightship` commands.

The commands are the real ones, agents and workers with all that they do to each other; only the
seconds of importing are spent once. An agent's workers are forked from the agent, as its children.

    python -m tests.dist.zygote     # a JSON request a line in, the pid of its process a line out
"""

import faulthandler
import importlib
import json
import logging
import os
import select
import signal
from functools import partial
from pathlib import Path

import torch

# All that the commands import.
import lightship.commands.evaluate
import lightship.commands.fit
import lightship.commands.predict
import lightship.distributed.comm
import lightship.distributed.elastic_agent  # noqa: F401
from lightship import cli
from tests.support.forked_ranks import fork_ranks
from tests.support.warm import become


def command(arguments: list[str]) -> int:
    """`python -m lightship arguments`, in a process group of its own."""
    os.setsid()
    logging.getLogger("lightship").handlers.clear()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stacks = Path(os.environ["TEST_FOLDER"], f"stacks-{os.getpid()}")
    faulthandler.register(signal.SIGUSR2, stacks.open("w"))
    if "RANK" in os.environ:
        Path(os.environ["TEST_FOLDER"], f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    else:  # what an agent does to its modules, its forks inherit
        module, _, name = os.environ["TEST_HOOK"].partition(":")
        getattr(importlib.import_module(module), name)()
    return cli.main(arguments)


def main() -> None:
    fork_ranks(command)
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
                become(partial(command, request["arguments"]), request["env"], {1: log, 2: log})
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
