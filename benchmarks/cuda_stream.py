"""Part `stream`: JPEGs of a local disk at all cores: lightship, webdataset, the decoder's limit.

The files are in the page cache: what is measured is the pipeline's work a core, not a disk.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import stream_images
from benchmarks.cuda_part import LIMIT, Job

_ARMS = (
    ("decoder of lightship, from memory (limit)", "stream_limit", "folders", "ours"),
    ("lightship, packed", "stream_lightship", "packed", "packed"),
    ("webdataset", "stream_webdataset", "webdataset", ""),
    ("lightship, class folders", "stream_lightship", "folders", "folders"),
    ("decoder of torchvision, from memory", "stream_limit", "folders", "peers'"),
)
_EPOCH_LIMIT_S = 10.0


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """Steady rates: those of the epochs after the first."""
    cores = min(16, len(os.sched_getaffinity(0)))
    workers = os.environ.setdefault("WORKERS", str(cores))
    roots = write(job, *((20, 40) if job.is_toy else (512, 12_288)))
    epochs = os.environ.get("EPOCHS", "3")
    for name, module, reads, mode in _ARMS:
        cache = f"{job.folder}/cache-{module}-{mode}"
        os.mkdir(cache)
        command = [sys.executable, "-m", f"benchmarks.{module}", roots[reads], mode, cache, epochs]
        done = subprocess.run(
            [*command, str(_EPOCH_LIMIT_S)], stdout=subprocess.PIPE, text=True,
            timeout=max(1, job.left_s),
        )  # fmt: skip
        if done.returncode:
            yield {"arm": name, "note": f"failed with {done.returncode}, see the log"}
            continue
        yield {"arm": name, LIMIT: "limit" in name, **_rates(done.stdout, int(epochs), workers)}


def _rates(printed: str, epochs: int, workers: str) -> dict[str, Any]:
    result = json.loads(printed.strip().splitlines()[-1])
    later = range(2, epochs + 1)
    rates = [result[f"epoch{each}_images"] / result[f"epoch{each}_s"] for each in later]
    cpu_ms = 1000 * result["cpu_s"] / result["images"]
    first_s = result["first_batch_s"]
    note = f"{workers} workers; first batch {first_s:.2f} s; {cpu_ms:.2f} CPU ms an image"
    return {"images_per_s": rates, "note": note}


def write(job: Job, made: int, count: int) -> dict[str, str]:
    """`made` different images under `count` names, as class folders, shards and tars."""
    folders, packed, tars = (f"{job.folder}/{name}" for name in ("folders", "packed", "tars"))
    sources = stream_images.photographs()
    classes = min(made, stream_images.CLASSES)
    for number in range(classes):
        os.makedirs(f"{folders}/train/class_{number:03d}")

    def path(index: int) -> Path:
        return Path(f"{folders}/train/class_{index % classes:03d}/{index:06d}.jpg")

    def make(index: int) -> None:
        path(index).write_bytes(stream_images.make_image(sources, index))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(make, range(made)))
    for index in range(made, count):
        os.link(path(index % made), path(index))
    for command in (
        ["-m", "lightship", "pack", "--log_format=text", folders, packed],
        ["-m", "benchmarks.stream_pack", "webdataset", f"{folders}/train", tars],
    ):
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    return {"folders": folders, "packed": packed, "webdataset": tars}
