"""What reading S3 costs by s3fs and by obstore, through the storage's own seam.

COUNT=2000 RUNS=3 make bench TABLES=s3_clients
"""

import os
import time
from collections.abc import Callable

from benchmarks.process_tree import cpu_s
from benchmarks.table import machine, print_table, spread
from lightship import storage
from lightship.storage import ReadAhead, Span
from tests.support.s3 import S3Server

COUNT = int(os.environ.get("COUNT", "2000"))
RUNS = int(os.environ.get("RUNS", "3"))
IMAGE_BYTES, BLOCK_BYTES, BLOCKS = 111_000, 4 * 2**20, 64
Samples = dict[str, list[float]]


def main() -> None:
    """objects of an image's size, blocks and a listing, by each client"""
    results: dict[tuple[str, str], Samples] = {}
    with S3Server() as s3:
        os.environ.update(s3.env)
        url, large_url = s3.url("images"), s3.url("large")
        for i in range(COUNT):
            storage.write_bytes(f"{url}/{i:05d}.jpg", os.urandom(IMAGE_BYTES))
        storage.write_bytes(large_url, os.urandom(BLOCKS * BLOCK_BYTES))
        images = [Span(f"{url}/{i:05d}.jpg", 0, IMAGE_BYTES) for i in range(COUNT)]
        edges = range(0, BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
        blocks = [Span(large_url, start, start + BLOCK_BYTES) for start in edges]
        for _ in range(RUNS):
            for client in ("s3fs", "obstore"):
                os.environ["LIGHTSHIP_S3_CLIENT"] = client
                assert storage.exists(large_url)  # the client is built
                storage.read_range(large_url, 0, 1)
                for what, count, work in (
                    (f"GET of {IMAGE_BYTES // 1000} KB", COUNT, lambda: _read(images)),
                    ("GET of a block of 4 MiB", BLOCKS, lambda: _read(blocks)),
                    ("object listed", COUNT, lambda: storage.list_files(url)),
                ):
                    _measure(results.setdefault((what, client), {}), count, work, s3.process.pid)
    print(f"{machine()}; server and client share the cores; n = {RUNS}; median (range)\n")
    rows = [
        [what, client, spread(of["rate"]), spread(of["cpu_ms"], 3), spread(of["server_ms"], 3)]
        for (what, client), of in sorted(results.items())
    ]
    print_table(
        ["what", "client", "a second", "client's CPU ms each", "server's CPU ms each"], rows
    )


def _read(spans: list[Span]) -> None:
    reads = ReadAhead()
    for future in [reads.begin(span) for span in spans]:
        reads.result(future)
    reads.close()


def _measure(into: Samples, count: int, work: Callable[[], object], server: int) -> None:
    before = time.perf_counter(), time.process_time(), cpu_s(server)
    work()
    took_s, client_s, server_s = (
        now - then
        for now, then in zip(
            (time.perf_counter(), time.process_time(), cpu_s(server)), before, strict=True
        )
    )
    into.setdefault("rate", []).append(count / took_s)
    into.setdefault("cpu_ms", []).append(1000 * client_s / count)
    into.setdefault("server_ms", []).append(1000 * server_s / count)
