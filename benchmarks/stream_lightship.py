"""Arms `lightship`: its packed shards (`packed`), class folders as they are (`folders`).

Mode `resumed` begins in the middle of the first epoch.

`python -m benchmarks.stream_lightship pack SOURCE TARGET` packs for the first of them. The
worker is started, and the client of the storage built, beside this process's own imports, as
`lightship fit` does it.
"""

import sys

from lightship import storage
from lightship.data.streaming.worker_process import Worker

if __name__ == "__main__" and sys.argv[1] != "pack":
    storage.make_ready(sys.argv[1])
    Worker.start(sys.argv[1])

import subprocess
from collections.abc import Iterator

import torch

from benchmarks.stream_arm import BATCH, SIZE_PX, WORKERS, run
from lightship.data.augment import Augment
from lightship.data.bad_samples import BadSamples
from lightship.data.order_versions import order_of
from lightship.data.sample_decoder import SampleDecoder
from lightship.data.shares import TrainShare
from lightship.data.sources import layouts
from lightship.data.streaming.loaders import StreamedSplit, StreamedTrainLoader
from lightship.data.streaming.prefetch import BatchRange

BUDGET_BYTES = 2 * 2**30


class Batches:
    """An iteration an epoch of the training batches of `lightship fit`, and no remainder."""

    def __init__(self, root: str, epochs: int, is_resumed: bool) -> None:
        self.epochs = epochs  # nothing is read ahead for epochs that do not come
        manifest = layouts.scan(root)["train"]
        order = order_of(manifest, BATCH, seed=0)
        bad = BadSamples(manifest, len(manifest), None)
        decoder = SampleDecoder(manifest, SIZE_PX)
        split = StreamedSplit(decoder, WORKERS, BUDGET_BYTES, 0, bad, torch.device("cpu"))
        share = TrainShare(order, rank=0, world_size=1, parts=1)
        self.epoch, self.batch, self.batches = 0, 0, len(share)
        self.first = len(share) // 2 if is_resumed else 0
        self.loader = iter(
            StreamedTrainLoader(split, share, Augment(0, flip=True), 0.08, self.wanted)
        )

    def wanted(self) -> BatchRange:
        return BatchRange(self.epoch, self.batch, self.batches, self.epochs)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for place in range(self.first, self.batches):
            self.batch = place
            batch = next(self.loader)
            yield batch.images, batch.labels
        self.epoch, self.first = self.epoch + 1, 0


def pack(source: str, target: str) -> None:
    """Class folders at the URL `source` into shards at the URL `target`."""
    subprocess.run([sys.executable, "-m", "lightship", "pack", source, target], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "pack":
        pack(*sys.argv[2:])
    else:
        run(lambda root, mode, cache: Batches(root, int(sys.argv[4]), mode == "resumed"))
