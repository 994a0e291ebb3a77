"""What the manifest and the order of samples cost a rank, from 10^6 to 10^9 samples."""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import scale_manifest
from benchmarks.table import machine, print_table, run_json

RUNS = int(os.environ.get("RUNS", "3"))
BATCH = 1024
SIZES = [int(float(size)) for size in os.environ.get("SIZES", "1e6 1e7 1e8 1e9").split()]
MADE = [int(float(size)) for size in os.environ.get("MADE", "1e5 1e6 1e7").split()]
LISTED = [int(float(size)) for size in os.environ.get("LISTED", "1e6 1e7").split()]
_MAX_SORTED = 10**7  # of version 1: ten times as many take 10 GB


def main() -> None:
    """a rank's manifest and order: time and memory, by size (RUNS=n, SIZES=, MADE=, LISTED=1e6)"""
    print(f"{machine()}; n = {RUNS}, medians; CPU time where wall time is not named\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCALE_DIR")) as folder:
        _ranks(Path(folder))
    _makes()
    _lists()


def _ranks(folder: Path) -> None:
    """A rank that maps a table: its first batch, each batch, and the next epoch's first."""
    rows = []
    for size in SIZES:
        table = folder / "table"
        scale_manifest.write(table, size)
        arms = [
            (version, world_size)
            for version in (2, 1)
            for world_size in (1, 1024)
            if version == 2 or size <= _MAX_SORTED
        ]
        found: dict[tuple[int, int], list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _ in range(RUNS):
            for version, world_size in arms:
                numbers = (str(number) for number in (world_size, version, BATCH))
                result = run_json("benchmarks.scale_order", str(table), *numbers)
                found[version, world_size].append(result)
        for (version, world_size), results in found.items():

            def middle(name: str, of: list[dict[str, Any]] = results) -> float:
                return statistics.median(each[name] for each in of)

            rows.append([
                f"{size:.0e}", f"{middle('table_mb'):,.0f}", str(version), str(world_size),
                _times(results, "first", 1, 3), _times(results, "batch", 1e3, 2),
                _times(results, "jump", 1e3, 2), _times(results, "cold", 1e3, 2),
                _times(results, "epoch", 1, 3),
                f"{middle('own_mb'):.0f}", f"{middle('peak_mb'):.0f}",
                f"{middle('pickled_bytes'):.0f}",
                f"{middle('quality'):.4f}" if "quality" in results[0] else "",
            ])  # fmt: skip
        table.unlink()
    print(
        f"Ids and rows of a batch of {BATCH}, of a mapped table of packed shards; CPU / wall "
        "time. Jump: the first batch after one in the epoch, whose pages are in memory but not "
        "mapped; cold jump: they are on the disk. Own: memory that is not the file's; peak: with "
        "its pages; both beyond the imports. To the worker: bytes of the manifest that the worker "
        "is sent. Quality: entropy of a batch's classes, of "
        f"{scale_manifest.CLASSES} sorted ones, over that of a full shuffle\n"
    )
    head = ["samples", "table MB", "order", "ranks", "first batch s", "batch ms", "jump ms"]
    head += ["cold jump ms", "next epoch s", "own MB", "peak MB", "to the worker B", "quality"]
    print_table(head, rows)


def _times(results: list[dict[str, Any]], name: str, factor: float, digits: int) -> str:
    """Medians of the runs, `CPU / wall`; empty if not all runs measured it."""
    if not all(name in each for each in results):
        return ""
    cpu, wall = (
        factor * statistics.median(each[name][key] for each in results)
        for key in ("cpu_s", "wall_s")
    )
    return f"{cpu:.{digits}f} / {wall:.{digits}f}"


def _makes() -> None:
    """What rank 0 does once, and each node once."""
    rows = []
    for layout in ("packed", "class folders"):
        for size in MADE:
            results = [run_json("benchmarks.scale_make", layout, str(size)) for _ in range(RUNS)]
            of = {key: statistics.median(each[key] for each in results) for key in results[0]}
            rows.append([layout, f"{size:.0e}", *(_cost(of, step) for step in _STEPS)])
    print(
        "\nA table of shards of 256 MiB without val, or of a file a sample with names of 32 bytes. "
        "MB: the most that is allocated at once, beyond the mapped files\n"
    )
    print_table(["layout", "samples", *_STEPS.values()], rows)


def _cost(of: dict[str, float], step: str) -> str:
    if f"{step}_s" not in of:
        return ""
    memory = f", {of[f'{step}_mb']:,.0f} MB" if f"{step}_mb" in of else ""
    return f"{of[f'{step}_s']:.2f} s{memory}"


_STEPS = {
    "index": "rank 0: fetch and check the index",
    "hold_out": "rank 0: hold out 5 %",
    "write": "rank 0: write the table with val",
    "copy": "a node: check its copy",
    "check": "rank 0: check an unknown table",
}


def _lists() -> None:
    """What rank 0 does at the first start of a run on class folders."""
    rows = []
    for size in LISTED:
        results = [run_json("benchmarks.scale_listing", str(size)) for _ in range(RUNS)]
        of = {key: statistics.median(each[key] for each in results) for key in results[0]}
        columns = (f"{of['list_us']:.1f}", f"{of['find_us']:.1f}", f"{of['peak_bytes']:.0f}")
        rows.append([f"{size:.0e}", *columns])
    print(
        "\nListing class folders in S3, names of 33 bytes, from parsed pages to the manifest. CPU "
        "microseconds and peak memory an object; the memory beyond that of the imports\n"
    )
    print_table(["objects", "listing us", "manifest us", "bytes"], rows)
