"""Whether the processes of a fit can sum over each other: real ones do it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from lightship.doctor.check import Finding, skipped

_MIB = 16  # what exchange.py sums
_MOST_ON_CPU = 2  # a pair shows what more would, without the imports of more
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_FIX = (
    "correct GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (they name this node's network interface), "
    "give containers a larger /dev/shm, and see NCCL_DEBUG=INFO"
)
_MEANS = "the first step would end, or hang until --trainer.timeout_s"


def on_this_node(processes: int, on_gpus: bool, timeout_s: float = 15.0) -> Finding:
    """An all-reduce between as many processes as a fit starts here (on CPUs: a pair).

    Args:
        processes: Of a fit on this node.
        on_gpus: One GPU each, by NCCL; else gloo.
        timeout_s: Bound of the whole.
    """
    if processes == 1:
        return skipped("one process on this node: nobody to exchange with (--trainer.devices)")
    count = processes if on_gpus else min(processes, _MOST_ON_CPU)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    here |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{**here, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _exchange(
        ranks, count, on_gpus, timeout_s, f"of {processes} " if count < processes else ""
    )


def under_a_launcher(on_gpus: bool, timeout_s: float = 18.0) -> Finding:
    """An all-reduce with the ranks that a launcher has started, each of which runs the doctor."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return skipped("one process: nobody to exchange with")
    return _exchange([{}], world_size, on_gpus, timeout_s, "")


def _exchange(
    ranks: Sequence[dict[str, str]], world_size: int, on_gpus: bool, timeout_s: float, of: str
) -> Finding:
    """Start exchange.py once for each set of variables, and wait for all of them."""
    backend, until = "nccl" if on_gpus else "gloo", time.monotonic() + timeout_s
    who = f"{world_size} {of}processes by {backend}"
    command = [sys.executable, "-m", "lightship.doctor.allreduce_worker", str(timeout_s), backend]
    errors: list[IO[str]] = [tempfile.TemporaryFile("w+") for _ in ranks]  # noqa: SIM115 (closed below)
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=error,
            text=True,
        )
        for variables, error in zip(ranks, errors, strict=True)
    ]
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break  # the others wait for one that has failed
            if time.monotonic() > until:
                return Finding("fail", f"{who}: not done in {timeout_s:g} s", _MEANS, _FIX)
            time.sleep(0.05)
        for process, error in zip(running, errors, strict=True):
            if process.poll():
                error.seek(0)
                lines = error.read().strip().splitlines() or [f"exit code {process.returncode}"]
                return Finding("fail", f"{who}: {lines[-1][:300]}{_told()}", _MEANS, _FIX)
        assert running[0].stdout is not None
        seconds = running[0].stdout.read().strip()
        speed = f", {_MIB / float(seconds):,.0f} MiB/s" if seconds else ""
        return Finding("ok", f"{who} have the right sum{speed}", "the ranks reach each other")
    finally:
        for process in running:
            process.kill()
            process.communicate()
        for error in errors:
            error.close()


def _told() -> str:
    """The variables that say by which interface, if any do."""
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return f" ({', '.join(given)})" if given else ""
