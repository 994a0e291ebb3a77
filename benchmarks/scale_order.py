"""One arm of the table `scale`: python -m benchmarks.scale_order TABLE WORLD_SIZE VERSION BATCH.

Prints one line of JSON.
"""

import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_manifest import CLASSES
from lightship.data.columns import Columns
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import open_table
from lightship.data.mapped_split import NUMBERS
from lightship.data.order import Order, Shuffle
from lightship.data.order_versions import order_of
from lightship.data.shares import TrainShare
from lightship.data.streaming import pickle_with_files

SOME_BATCHES, JUMPS, RUN = 100, 5, 20


def memory_mb(key: str) -> float:
    """A line of /proc/self/status: VmHWM is the peak since exec (ru_maxrss has the parent's)."""
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def entropy(order: Order, manifest: Manifest, batch_size: int) -> float:
    """Mean entropy of a batch's classes, of a set that is sorted by class, in bits."""
    found = []
    for batch in np.linspace(0, order.steps_per_epoch - 1, SOME_BATCHES).astype(int):
        places = batch * batch_size + np.arange(batch_size)
        share = np.bincount(manifest.label[order.ids(0, places)], minlength=CLASSES) / batch_size
        share = share[share > 0]
        found.append(float(-(share * np.log2(share)).sum()))
    return statistics.fmean(found)


@dataclass
class Spent:
    """Seconds of this process since it was made: of its processors, and as they pass."""

    cpu_s: float = field(default_factory=time.process_time)
    wall_s: float = field(default_factory=time.perf_counter)

    def until_now(self) -> dict[str, float]:
        """Both."""
        return {
            "cpu_s": time.process_time() - self.cpu_s,
            "wall_s": time.perf_counter() - self.wall_s,
        }


def median(spent: list[dict[str, float]]) -> dict[str, float]:
    """Of the two figures of several measurements."""
    return {key: statistics.median(each[key] for each in spent) for key in spent[0]}


class Rank:
    """The last rank of a run whose table is mapped anew."""

    def __init__(self, path: Path, world_size: int, version: int, batch_size: int) -> None:
        self.manifest = open_table(Columns(path))["train"]
        self.order = order_of(self.manifest, batch_size, 0, version)
        self.share = TrainShare(self.order, world_size - 1, world_size, 1)

    def fetch(self, epoch: int, batch: int) -> dict[str, float]:
        """What a batch's rows of the table take, and its first block's places."""
        began = Spent()
        ids = self.share.batches(epoch, batch, batch + 1)[0]
        for column in NUMBERS:
            getattr(self.manifest, column)[ids].astype(np.int64)
        assert self.order.blocks is not None
        self.share.batches_of(epoch, np.arange(*self.order.blocks.around(int(ids[0]))))
        return began.until_now()


def drop_pages(path: Path) -> bool:
    """Take a file that nothing maps out of memory; whether its middle then lies on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not written yet stays
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def main(path: Path, world_size: int, version: int, batch_size: int) -> None:
    """Measure the last rank's first batch, its batches, the next epoch's first, and the quality."""
    before_mb, own_mb, began = memory_mb("VmHWM"), memory_mb("RssAnon"), Spent()
    rank = Rank(path, world_size, version, batch_size)
    rank.fetch(0, 0)
    first = began.until_now()
    places = np.linspace(1, max(1, len(rank.share) - RUN), JUMPS).astype(int).tolist()
    spent = [[rank.fetch(0, at + step) for step in range(RUN)] for at in places]
    found: dict[str, Any] = {
        "first": first,
        "jump": median([each[0] for each in spent]),
        "batch": median([each for run in spent for each in run[1:]]),
        "epoch": rank.fetch(1, 0),
        "own_mb": memory_mb("RssAnon") - own_mb, "peak_mb": memory_mb("VmHWM") - before_mb,
        "pickled_bytes": len(pickle_with_files.dumps(rank.manifest)[0]),
        "table_mb": path.stat().st_size / 1e6,
    }  # fmt: skip
    if world_size == 1:
        whole = Shuffle(len(rank.manifest), batch_size, 0)
        quality = [entropy(each, rank.manifest, batch_size) for each in (rank.order, whole)]
        found["quality"] = quality[0] / quality[1]
    cold = []
    for at in places:
        del rank  # a page that is mapped stays
        gc.collect()
        is_cold = drop_pages(path)
        rank = Rank(path, world_size, version, batch_size)
        if is_cold:
            cold.append(rank.fetch(0, at))
    if cold:
        found["cold"] = median(cold)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
