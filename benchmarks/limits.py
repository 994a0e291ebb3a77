"""Unit costs of many ranks, counted or simulated in one process, for docs/scaling.md."""

import datetime
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.table import machine, print_table
from lightship.data.blocks import Blocks
from lightship.data.order import BlockShuffle
from lightship.data.shares import TrainShare

PER_BLOCK, BLOCK_BYTES = 37, 4 * 2**20
GROUPS = [int(size) for size in os.environ.get("GROUPS_OF", "2 4 8 16").split()]
_STORE_REQUESTS, _SAMPLED_BLOCKS = 20_000, 2000
_PORT = int(os.environ.get("PORT", "29761"))
_SECOND = datetime.timedelta(seconds=1)


def main() -> None:
    """requests and sockets of a process group, and 1,000 ranks' shares of the order, simulated"""
    print(f"{machine()}\n")
    _groups()
    _shares()


class Counting(dist.Store):
    """A store that counts what is asked of it."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self.inner, self.requests = inner, 0

    def set(self, key: str, value: Any) -> None:
        """As the store."""
        self.requests += 1
        self.inner.set(key, value)

    def get(self, key: str) -> Any:
        """As the store."""
        self.requests += 1
        return self.inner.get(key)

    def wait(self, keys: list[str], timeout: Any = 60 * _SECOND) -> None:  # type: ignore[override]
        """As the store."""
        self.requests += 1
        self.inner.wait(keys, timeout)


def _groups() -> None:
    """What each rank of a gloo group asks of the store, and its sockets; and the store's speed."""
    rows = []
    for size in GROUPS:
        context = multiprocessing.get_context("fork")
        found: Any = context.Queue()
        ranks = [
            context.Process(target=_join, args=(rank, size, _PORT + size, found))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        counts = [found.get(timeout=120) for _ in ranks]
        for rank in ranks:
            rank.join()
        requests, sockets, _ = (max(each) for each in zip(*counts, strict=True))
        per_s = max(each[2] for each in counts)
        rows.append([str(size), str(requests), str(sockets), f"{per_s:,.0f}" if per_s else ""])
    print("A group of gloo (torch.distributed), formed; the most of any rank\n")
    print_table(
        ["ranks", "requests to the store", "sockets", "store: requests/s of one rank"], rows
    )


def _join(rank: int, size: int, port: int, found: Any) -> None:
    inner = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=60 * _SECOND)
    before, store = _sockets(), Counting(inner)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    dist.barrier()
    requests, sockets, per_s = store.requests, _sockets() - before, 0.0
    if rank == size - 1 and size == GROUPS[0]:
        began_s = time.perf_counter()
        for _ in range(_STORE_REQUESTS):
            inner.check(["x"])
        per_s = _STORE_REQUESTS / (time.perf_counter() - began_s)
    dist.barrier()
    found.put((requests, sockets, per_s))
    dist.barrier()
    time.sleep(0.5 if rank else 1.0)  # rank 0 serves the store


def _sockets() -> int:
    """Of this process, of the internet (not pipes, not socket pairs)."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    tables = [Path(f"/proc/self/net/{kind}").read_text().splitlines() for kind in ("tcp", "tcp6")]
    known = {f"socket:[{line.split()[9]}]" for table in tables for line in table[1:]}
    return len(inodes & known)


def _shares() -> None:
    """The shares of all ranks of a job, by one process after another: what they read."""
    rows = []
    for samples, ranks, each in [
        (10**6, 8, 32), (10**7, 64, 32), (10**8, 1024, 32), (10**9, 1024, 32), (10**9, 8192, 32),
        (10**9, 8192, 8), (10**9, 1024, 4),
    ]:  # fmt: skip
        blocks = Blocks(np.array([0, samples]), PER_BLOCK)
        order = BlockShuffle(blocks, ranks * each, 0, samples * BLOCK_BYTES // PER_BLOCK)
        shares = [TrainShare(order, rank, ranks, 1) for rank in range(min(ranks, 1024))]
        began_s = time.process_time()
        parts = [share.batches(0, 5, 6)[0] for share in shares]
        spent_ms = 1e3 * (time.process_time() - began_s) / len(shares)
        ids = np.concatenate(parts)
        assert len(set(ids.tolist())) == len(ids), "a sample is in one share alone"
        rows.append([
            f"{samples:.0e}", f"{ranks:,}", str(each), f"{spent_ms:.2f}",
            f"{_readers(order, blocks, ranks, each):.3f}",
            f"{order.mixed_bytes / ranks / 2**20:.0f}", f"{len(ids):,}",
        ])  # fmt: skip
    print("\nShares of a global batch, of blocks of 4 MiB\n")
    head = ["samples", "ranks", "images a rank", "ms a rank", "ranks that read a block"]
    print_table([*head, "held a rank, MiB", "different ids"], rows)


def _readers(order: BlockShuffle, blocks: Blocks, ranks: int, each: int) -> float:
    """Mean number of ranks that want samples of a block in an epoch: requests a block."""
    rng, found = np.random.default_rng(0), []
    for block in rng.integers(0, blocks.count, _SAMPLED_BLOCKS).tolist():
        ids = block * PER_BLOCK + np.arange(PER_BLOCK)
        places = order.places(0, ids)
        rows = places[places >= 0] % order.global_batch_size
        found.append(len(np.unique(rows // each)))
    assert max(found) <= ranks
    return float(np.mean(found))
