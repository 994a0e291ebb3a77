"""One arm of the table `scale`: python -m benchmarks.scale_order TABLE WORLD_SIZE VERSION BATCH.

Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

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


def main(path: Path, world_size: int, version: int, batch_size: int) -> None:
    """Measure the last rank's first batch, its batches, the next epoch's first, and the quality."""
    before_mb, own_mb, began_s = memory_mb("VmHWM"), memory_mb("RssAnon"), time.process_time()
    manifest = open_table(Columns(path))["train"]
    order = order_of(manifest, batch_size, 0, version)
    share = TrainShare(order, world_size - 1, world_size, 1)

    def fetch(epoch: int, batch: int) -> float:
        """Processor seconds for a batch's rows of the table, and its first block's places."""
        from_s = time.process_time()
        ids = share.batches(epoch, batch, batch + 1)[0]
        for column in NUMBERS:
            getattr(manifest, column)[ids].astype(np.int64)
        assert order.blocks is not None
        share.batches_of(epoch, np.arange(*order.blocks.around(int(ids[0]))))
        return time.process_time() - from_s

    fetch(0, 0)
    first_s = time.process_time() - began_s
    places = np.linspace(1, max(1, len(share) - RUN), JUMPS).astype(int).tolist()
    spent_s = [[fetch(0, at + step) for step in range(RUN)] for at in places]
    jump_s = statistics.median(each[0] for each in spent_s)
    batch_s = statistics.median(each for run in spent_s for each in run[1:])
    epoch_s = fetch(1, 0)
    found = {
        "first_s": first_s, "batch_ms": 1e3 * batch_s, "jump_ms": 1e3 * jump_s, "epoch_s": epoch_s,
        "own_mb": memory_mb("RssAnon") - own_mb, "peak_mb": memory_mb("VmHWM") - before_mb,
        "pickled_bytes": len(pickle_with_files.dumps(manifest)[0]),
        "table_mb": path.stat().st_size / 1e6,
    }  # fmt: skip
    if world_size == 1:
        whole = Shuffle(len(manifest), batch_size, 0)
        quality = [entropy(each, manifest, batch_size) for each in (order, whole)]
        found["quality"] = quality[0] / quality[1]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
