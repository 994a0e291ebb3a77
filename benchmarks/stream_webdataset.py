"""Arm `webdataset`: tar shards, each through one curl, as its README sets up S3-like stores.

Of a local folder it reads the files as they are.
"""

import os
from typing import Any

import webdataset as wds

from benchmarks.stream_arm import BATCH, WORKERS, pixels, run

SHARDS = 5 * WORKERS  # as many for each
CURL = (
    "pipe:curl -s -f --aws-sigv4 aws:amz:us-east-1:s3 "
    '--user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" '
)


def sample(sample: tuple[bytes, bytes]) -> tuple[Any, int]:
    return pixels(sample[0]), int(sample[1])


def open_batches(root: str, mode: str, cache: str) -> wds.WebLoader:
    folder = root
    if root.startswith("s3:"):
        folder = CURL + root.replace("s3:/", os.environ["AWS_ENDPOINT_URL"])
    shards = f"{folder}/train-{{000000..{SHARDS - 1:06d}}}.tar"
    dataset = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map(sample)
        .batched(BATCH)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)


if __name__ == "__main__":
    run(open_batches)
