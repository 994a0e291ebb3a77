"""Arms `ImageFolder over s3fs`: torchvision's ImageFolder with s3fs instead of open().

Mode `each` is a `cat_file` for each image, as in every example; mode `batches` the best that s3fs
offers a map-style dataset: the objects of a batch by one concurrent `cat`.
"""

from typing import Any

import s3fs
from torch.utils.data import DataLoader, Dataset

from benchmarks.stream_arm import BATCH, WORKERS, pixels, run


class ImageFolder(Dataset):
    in_flight = 10  # s3fs's default

    def __init__(self, root: str):
        self.paths = sorted(path for path in self.store().find(root) if path[-4:] == ".jpg")
        names = sorted({path.split("/")[-2] for path in self.paths})
        self.labels = [names.index(path.split("/")[-2]) for path in self.paths]

    def store(self) -> s3fs.S3FileSystem:
        """One a process, fsspec keeps it; it asks for no object's size before it reads it."""
        pool = {"max_pool_connections": self.in_flight}
        return s3fs.S3FileSystem(max_concurrency=1, config_kwargs=pool)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return pixels(self.store().cat_file(self.paths[index])), self.labels[index]


class Batched(ImageFolder):
    in_flight = 64

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        files = self.store().cat([self.paths[index] for index in indices], batch_size=64)
        return [(pixels(files[self.paths[index]]), self.labels[index]) for index in indices]


def open_batches(root: str, mode: str, cache: str) -> DataLoader:
    dataset = ImageFolder(root) if mode == "each" else Batched(root)
    return DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )


if __name__ == "__main__":
    run(open_batches)
