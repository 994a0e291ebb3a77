"""One rank of the all-reduce, in a process of its own.

Joins the group that torchrun's variables name, checks one sum and times larger ones. Prints how far
it is (imported, connected, all started), and rank 0 the best time. It opens the group as
distributed/comm.py does, but without importing Lightning.
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lightship.distributed.store import open_store

_NUMBERS = 4 * 2**20  # 16 MiB
_ROUNDS = 3


def main(timeout_s: float, backend: str) -> None:
    """All-reduce once and exit; a failure exits with a traceback. Blocks."""
    print("imported", flush=True)
    on_cuda, timeout = backend == "nccl", timedelta(seconds=timeout_s)
    store, rank, world_size = open_store(timeout_s)
    print("connected", flush=True)
    store.add("started", 1)
    while store.add("started", 0) < world_size:
        time.sleep(0.05)
    print("all started", flush=True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store, rank=rank, world_size=world_size, timeout=timeout,
    )  # fmt: skip
    for kind in {torch.device("cpu"), device}:
        numbers = torch.full((1024,), float(rank + 1), device=kind)
        dist.all_reduce(numbers)
        expected = world_size * (world_size + 1) / 2
        if not bool((numbers == expected).all()):
            raise SystemExit(f"the sum over {world_size} ranks on {kind} is wrong: {numbers[:4]}")
    numbers = torch.ones(_NUMBERS, device=device)
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
