"""Arms `lightship`: its packed shards (mode `packed`), class folders as they are (mode `folders`).

`python -m tests.benchmarks.stream_lightship pack SOURCE TARGET` packs for the first of them.
"""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lightship.config import DataConfig
from lightship.data.module import ImageData
from lightship.data.streaming import StreamedTrainLoader
from tests.benchmarks.stream_arm import BATCH, SIZE_PX, run


class Batches:
    """The loader of `lightship fit`, asked for batches as its trainer asks; an epoch an iteration.

    The table of samples is made anew, as in a run's first start.
    """

    def __init__(self, root: str, epochs: int):
        config = DataConfig(
            root=root,
            mode="streaming",
            global_batch_size=BATCH,
            image_size_px=SIZE_PX,
            crop_min_area=0.08,
            flip=True,
            val_fraction=0,
        )
        data = ImageData(
            config, seed=0, accumulate=1, say=lambda line: print(line, file=sys.stderr)
        )
        data.load_manifests(None, "train")
        self.done = SimpleNamespace(ready=0)
        progress = SimpleNamespace(batch_progress=SimpleNamespace(current=self.done))
        self.trainer = SimpleNamespace(
            world_size=1,
            global_rank=0,
            current_epoch=0,
            max_epochs=epochs,
            fit_loop=SimpleNamespace(epoch_loop=progress),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        self.trainer.num_training_batches = len(data.manifests["train"]) // BATCH
        data.trainer = self.trainer
        loader = data.train_dataloader()
        assert isinstance(loader, StreamedTrainLoader)
        self.batches, self.per_epoch = iter(loader), len(loader)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self.done.ready = 0
        for _ in range(self.per_epoch):
            batch = next(self.batches)
            yield batch.images, batch.labels
            self.done.ready += 1
        self.trainer.current_epoch += 1


def open_batches(root: str, mode: str, cache: str) -> Batches:
    return Batches(root, epochs=int(sys.argv[4]))


def pack(source: str, target: str) -> None:
    """Class folders at the URL `source` into shards at the URL `target`."""
    subprocess.run([sys.executable, "-m", "lightship", "pack", source, target], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "pack":
        pack(*sys.argv[2:])
    else:
        run(open_batches)
