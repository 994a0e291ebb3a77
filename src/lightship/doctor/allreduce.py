"""Whether the processes of a fit can all-reduce: real ones do it."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.errors import ConfigError

_MIB = 16  # of the all-reduce that is timed
_MAX_RANKS_ON_CPU = 2  # more would show no more, and take their time to import torch
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_MEANS = "the first step fails, or hangs until --trainer.timeout_s"
_BUSY = "run doctor again when the processors and the disk are less busy"
_FIX = (
    "correct GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (this node's network interface), give "
    "containers a larger /dev/shm, and see NCCL_DEBUG=INFO"
)


def all_reduce(context: Context) -> Finding:
    """An all-reduce between the ranks of a launcher, or as many as a fit starts on this node."""
    return context.once(measure).result()


def measure(context: Context) -> Finding:
    """The same, once for each caller: see `Context.once`. Blocks for 18 s at most."""
    if context.config.trainer.is_on_tpu:
        return skipped("--trainer.accelerator tpu: XLA has its own collectives")
    if context.is_worker:
        ranks = int(os.environ["WORLD_SIZE"])
        if ranks == 1:
            return skipped("one process: no collectives")
        return _run([{}], ranks, f"{ranks} ranks", context.on_gpus, 18.0)
    try:
        processes = context.processes
    except ConfigError as error:
        return skipped(f"the number of processes is not known ({error})")
    if processes == 1:
        return skipped("one process on this node: no collectives (--trainer.devices)")
    ranks = processes if context.on_gpus else min(processes, _MAX_RANKS_ON_CPU)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    named = f"{ranks} of {processes} ranks" if ranks < processes else f"{ranks} ranks"
    return _run(each, ranks, named, context.on_gpus, 15.0)


def _run(
    ranks: Sequence[dict[str, str]], world_size: int, named: str, on_gpus: bool, timeout_s: float
) -> Finding:
    """Start allreduce_worker.py once for each set of variables, and wait for all of them."""
    backend, until_s = "nccl" if on_gpus else "gloo", time.monotonic() + timeout_s
    group = f"({backend}, {named})"
    code = (
        "from lightship.distributed.libraries import preload; preload(); "
        f"from lightship.doctor.allreduce_worker import main; main({timeout_s!r}, {backend!r})"
    )
    command = [sys.executable, "-P", "-c", code]
    with ExitStack() as at_exit:
        outputs = [at_exit.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
        running = []
        for variables, output in zip(ranks, outputs, strict=True):
            environment = {**os.environ, **variables}
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            at_exit.callback(process.wait)
            at_exit.callback(process.kill)  # runs first
            running.append(process)
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break  # the others wait for the one that failed
            if time.monotonic() > until_s:
                return _late(f"all-reduce {group}: no result within {timeout_s:g} s", outputs)
            time.sleep(0.05)
        for process, output in zip(running, outputs, strict=True):
            if process.poll():
                output.seek(0)
                lines = output.read().strip().splitlines() or [f"exit code {process.returncode}"]
                found = f"all-reduce failed {group}: {lines[-1][:300]}{_interfaces()}"
                return Finding("fail", found, _MEANS, _FIX)
        outputs[0].seek(0)
        seconds = re.search(r"^seconds (.+)$", outputs[0].read(), re.MULTILINE)
        speed = f", {_MIB / float(seconds[1]):,.0f} MiB/s" if seconds else ""
        return Finding("ok", f"all-reduce OK {group}{speed}", "the ranks reach each other")


def _late(found: str, outputs: Sequence[TextIO]) -> Finding:
    """A failure, unless ranks that have not started yet explain it. See allreduce_worker.py."""
    for output in outputs:
        output.seek(0)
        progress = output.read()
        waits = "connected" in progress and "all started" not in progress
        if waits or "imported" not in progress:
            means = "unknown whether the ranks reach each other"
            return Finding("warn", f"{found}: a rank is still importing torch", means, _BUSY)
    return Finding("fail", found, _MEANS, _FIX)


def _interfaces() -> str:
    """The variables that set the network interface, if any do."""
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return f" ({', '.join(given)})" if given else ""
