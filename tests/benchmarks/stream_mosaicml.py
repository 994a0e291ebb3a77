"""Arm `mosaicml-streaming`: MDS shards, kept in a local folder for the second epoch."""

from typing import Any

from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

from tests.benchmarks.stream_arm import BATCH, WORKERS, pixels, run


class Images(StreamingDataset):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = super().__getitem__(index)
        return pixels(sample["image"]), sample["class"]


def open_batches(root: str, mode: str, cache: str) -> DataLoader:
    dataset = Images(remote=root, local=cache, shuffle=True, batch_size=BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


if __name__ == "__main__":
    clean_stale_shared_memory()  # what its documentation asks for after runs that were killed
    run(open_batches)
