"""One arm of the table `scale`: python -m benchmarks.scale_make LAYOUT SAMPLES.

What happens to a manifest once a run and once a node. Prints one line of JSON.
"""

import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks import scale_manifest
from lightship.data.columns import Columns
from lightship.data.held_out import hold_out
from lightship.data.manifest import Manifest
from lightship.data.manifest_table import check_table, open_table, write_table
from lightship.data.shards.index import INDEX, load_index, shard_sizes
from lightship.storage.file_list import FileList

T = TypeVar("T")
_FRACTION = 0.05


def folders(samples: int) -> Manifest:
    """Class folders of 1,000 classes."""
    label = np.arange(samples) * 1000 // samples
    return Manifest(
        root="s3://bucket/set",
        files=FileList.of(f"train/n{i // 1300:08d}/{i:012d}.JPEG" for i in range(samples)),
        file_index=np.arange(samples, dtype=np.int32),
        offset=np.zeros(samples, dtype=np.int64),
        length=np.random.default_rng(0).integers(20_000, 200_000, samples),
        label=label,
        crc32=np.full(samples, -1),
        class_names=[str(i) for i in range(1000)],
        container="bytes",
        encoding="image",
    )


def main(layout: str, samples: int) -> None:
    """Measure each step: its processor time, and the memory that it allocates at most.

    Memory by a second call, and of packed shards alone: tracing a name a sample takes minutes.
    """
    found = {}

    def step(name: str, work: Callable[[int], T]) -> T:
        began_s = time.process_time()
        result = work(0)
        found[f"{name}_s"] = time.process_time() - began_s
        if layout != "packed":
            return result
        tracemalloc.start()
        result = work(1)
        found[f"{name}_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return result

    with tempfile.TemporaryDirectory(dir=os.environ.get("SCALE_DIR")) as folder:
        if layout == "packed":
            root = Path(folder, "packed")
            root.mkdir()
            scale_manifest.write(root / INDEX, samples)
            listed = shard_sizes(open_table(Columns(root / INDEX))["train"])
            listed[INDEX] = (root / INDEX).stat().st_size

            def read_index(turn: int) -> Manifest:
                os.environ["LIGHTSHIP_CACHE"] = f"{folder}/{turn}"  # another node
                return load_index(str(root), INDEX, str(root), listed)["train"]

            manifest = step("index", read_index)
        else:
            manifest = folders(samples)
        held_out = step("hold_out", lambda _: hold_out(manifest, _FRACTION))
        path = Path(folder, "table")
        step(
            "write",
            lambda turn: write_table(Path(f"{path}{turn}"), {"train": manifest}, held_out),
        )
        step("copy", lambda _: Columns(Path(f"{path}0")).check_content())
        step("check", lambda _: check_table(Columns(Path(f"{path}0"))))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
