"""One arm of the table `scale`: python -m benchmarks.scale_make SAMPLES.

What happens to a manifest once a run and once a node. Prints one line of JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.scale_order import memory_mb
from lightship.data.columns import Columns
from lightship.data.file_list import FileList
from lightship.data.manifest import Manifest, split_validation
from lightship.data.manifest_table import check_table, write_table

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


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def main(samples: int) -> None:
    """Measure each step."""
    before_mb, manifest = memory_mb("VmHWM"), folders(samples)
    found = {"hold_out_s": timed(lambda: split_validation(manifest, _FRACTION))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table")
        found["write_s"] = timed(lambda: write_table(path, {"train": manifest}))
        found["copy_s"] = timed(lambda: Columns(path).check_content())
        found["check_s"] = timed(lambda: check_table(Columns(path)))
    print(json.dumps({**found, "peak_mb": memory_mb("VmHWM") - before_mb}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
