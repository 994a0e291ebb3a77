"""Arms `litdata`: its optimized chunks (mode `chunks`), class folders as they are (mode `raw`)."""

from typing import Any

import litdata as ld
from litdata.streaming import downloader
from torch.utils.data import DataLoader

from tests.benchmarks.stream_arm import BATCH, WORKERS, cropped, pixels, run

# Its obstore client refuses plain http, and has no option for it; S3 here is http on loopback.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def sample(sample: dict[str, Any]) -> tuple[Any, int]:
    return cropped(sample["image"]), sample["class"]


class Folders(ld.StreamingRawDataset):
    """Class folders: the label is the folder's place among the sorted folders."""

    def setup(self, files: list) -> list:
        names = sorted({self.name_of(file.path) for file in files})
        self.labels = {name: label for label, name in enumerate(names)}
        return files

    @staticmethod
    def name_of(path: str) -> str:
        return path.rsplit("/", 2)[1]

    def __getitems__(self, indices: list[int]) -> list:
        images = super().__getitems__(indices)
        labels = [self.labels[self.name_of(self.items[index].path)] for index in indices]
        return list(zip(images, labels, strict=True))


def open_batches(root: str, mode: str, cache: str) -> Any:
    if mode == "raw":  # spawned workers, as its README asks for after the parent listed the files
        return DataLoader(
            Folders(root, cache_dir=cache, transform=pixels),
            batch_size=BATCH,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            multiprocessing_context="spawn",
        )
    dataset = ld.StreamingDataset(root, cache_dir=cache, shuffle=True, transform=sample)
    return ld.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True
    )


if __name__ == "__main__":
    run(open_batches)
