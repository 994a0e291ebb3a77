"""Arms `mosaicml-streaming`: MDS shards, kept in a local folder for the second epoch.

Mode `shipped` is as its quick start has it. There the client that fetched the index is inherited,
with its open connection, by all forked workers, which then read each other's answers: most runs
fail, or read garbage. Mode `mended` drops that client before the workers start.
"""

from typing import Any

from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

from benchmarks.stream_arm import BATCH, WORKERS, pixels, run


class Images(StreamingDataset):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = super().__getitem__(index)
        return pixels(sample["image"]), sample["class"]


def open_batches(root: str, mode: str, cache: str) -> DataLoader:
    dataset = Images(remote=root, local=cache, shuffle=True, batch_size=BATCH)
    if mode == "mended":
        for stream in dataset.streams:
            stream._downloader.clean_up()
    return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


if __name__ == "__main__":
    clean_stale_shared_memory()  # what its documentation asks for after runs that were killed
    run(open_batches)
