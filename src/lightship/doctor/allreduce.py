"""Whether the processes of a fit can all-reduce: real ones do it.

Each of them runs `main` and prints how far it is (imported, connected, all started), and rank 0 the
best time.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TextIO

import torch
import torch.distributed as dist

from lightship.distributed.store import open_store
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.errors import ConfigError

_MIB, _ROUNDS = 16, 3  # of the all-reduces that are timed
_MAX_RANKS_ON_CPU = 2  # more would show no more, and take their time to import torch
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_MEANS = "the first step fails, or hangs until --trainer.timeout_s"
_BUSY = "run doctor again when the processors and the disk are less busy"
_FIX = (
    "correct GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (this node's network interface), give "
    "containers a larger /dev/shm, and see NCCL_DEBUG=INFO"
)


def all_reduce(context: Context) -> Finding:
    """An all-reduce between the ranks of a launcher, or as many as a fit starts on this node.

    Blocks for 18 s at most.
    """
    if context.config.trainer.is_on_tpu:
        return skipped("--trainer.accelerator tpu: XLA has its own collectives")
    if context.is_worker:
        ranks = int(os.environ["WORLD_SIZE"])
        if ranks == 1:
            return skipped("one process: no collectives")
        return _run([{}], f"{ranks} ranks", context.on_gpus, 18.0)
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
    return _run(each, named, context.on_gpus, 15.0)


def _run(ranks: Sequence[dict[str, str]], named: str, on_gpus: bool, timeout_s: float) -> Finding:
    """Start `main` in a process for each set of variables, and wait for all of them."""
    backend, until_s = "nccl" if on_gpus else "gloo", time.monotonic() + timeout_s
    group = f"({backend}, {named})"
    code = (
        "from lightship.distributed.libraries import preload; preload(); "
        f"from lightship.doctor.allreduce import main; main({on_gpus}, {timeout_s})"
    )
    with ExitStack() as at_exit:
        outputs = [at_exit.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
        running = []
        for variables, output in zip(ranks, outputs, strict=True):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], env={**os.environ, **variables},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            running.append(at_exit.enter_context(process))
            at_exit.callback(process.kill)  # before the context waits for its end
        # One that failed has the others wait.
        while None in (codes := [process.poll() for process in running]) and not any(codes):
            if time.monotonic() > until_s:
                found = f"all-reduce {group}: no result within {timeout_s:g} s"
                return _late(found, [_text(output) for output in outputs])
            time.sleep(0.05)
        texts = [_text(output) for output in outputs]
    for exit_code, text in zip(codes, texts, strict=True):
        if exit_code:
            lines = text.strip().splitlines() or [f"exit code {exit_code}"]
            found = f"all-reduce failed {group}: {lines[-1][:300]}"
            given = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
            found += f" ({', '.join(given)})" if given else ""
            return Finding("fail", found, _MEANS, _FIX)
    seconds = re.search(r"^seconds (.+)$", texts[0], re.MULTILINE)
    speed = f", {_MIB / float(seconds[1]):,.0f} MiB/s" if seconds else ""
    return Finding("ok", f"all-reduce OK {group}{speed}", "the ranks reach each other")


def _text(output: TextIO) -> str:
    output.seek(0)
    return output.read()


def _late(found: str, outputs: Sequence[str]) -> Finding:
    """A failure, unless ranks that have not started yet explain it."""
    for output in outputs:
        waits = "connected" in output and "all started" not in output
        if waits or "imported" not in output:
            means = "unknown whether the ranks reach each other"
            return Finding("warn", f"{found}: a rank is still importing torch", means, _BUSY)
    return Finding("fail", found, _MEANS, _FIX)


def main(on_gpus: bool, timeout_s: float) -> None:
    """One rank: join the group that torchrun's variables name, check a sum, time larger ones.

    Opens the group as distributed/comm.py does, but without importing Lightning. Blocks, and exits;
    a failure exits with a traceback.
    """
    print("imported", flush=True)
    store, rank, world_size = open_store(timeout_s)
    print("connected", flush=True)
    store.add("started", 1)
    while store.add("started", 0) < world_size:
        time.sleep(0.05)
    print("all started", flush=True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    for kind in {torch.device("cpu"), device}:
        numbers = torch.full((1024,), float(rank + 1), device=kind)
        dist.all_reduce(numbers)
        if not bool((numbers == world_size * (world_size + 1) / 2).all()):
            raise SystemExit(f"the sum over {world_size} ranks on {kind} is wrong: {numbers[:4]}")
    numbers = torch.ones(_MIB * 2**18, device=device)
    times_s = []
    for _ in range(_ROUNDS):
        started_s = time.perf_counter()
        dist.all_reduce(numbers)
        numbers[0].item()  # waits for the device
        times_s.append(time.perf_counter() - started_s)
    if rank == 0:
        print("seconds", min(times_s), flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a regular exit takes seconds on a busy machine: it unloads torch
