"""Arms `litdata`: its optimized chunks (mode `chunks`), class folders as they are (mode `raw`).

Of a chunk that two workers share, 0.2.76 reads all 64 MB for each image, to see whether it is
compressed: much in a set of ten chunks. Mode `mended` is `chunks` without that look.
"""

from functools import cached_property
from typing import Any

import litdata as ld
from litdata.streaming import downloader
from litdata.streaming.item_loader import _BATCH_SKIP, PyTreeLoader
from torch.utils.data import DataLoader

from benchmarks.stream_arm import BATCH, WORKERS, cropped, pixels, run

# Its obstore client refuses plain http, and has no option for it; S3 here is http on loopback.
downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def sample(sample: dict[str, Any]) -> tuple[Any, int]:
    return cropped(sample["image"]), sample["class"]


_as_shipped = PyTreeLoader._load_batched_item


def mended(self: PyTreeLoader, *place: Any) -> Any:
    """Take the image alone if its chunk is not mapped, that is shared; none is compressed here."""
    return _BATCH_SKIP if self._mmap is None else _as_shipped(self, *place)


class Folders(ld.StreamingRawDataset):
    """Class folders: the label is the folder's place among the sorted folders."""

    @cached_property
    def labels(self) -> list[int]:
        names = [item.path.rsplit("/", 2)[1] for item in self.items]
        numbers = {name: label for label, name in enumerate(sorted(set(names)))}
        return [numbers[name] for name in names]

    def __getitems__(self, indices: list[int]) -> list:
        images = super().__getitems__(indices)
        return [(image, self.labels[i]) for image, i in zip(images, indices, strict=True)]


def open_batches(root: str, mode: str, cache: str) -> Any:
    if mode == "raw":  # forked workers, as in its quick start: spawned ones take 3 s more to start
        return DataLoader(
            Folders(root, cache_dir=cache, transform=pixels),
            batch_size=BATCH,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
        )
    if mode == "mended":
        PyTreeLoader._load_batched_item = mended
    dataset = ld.StreamingDataset(root, cache_dir=cache, shuffle=True, transform=sample)
    return ld.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True
    )


if __name__ == "__main__":
    run(open_batches)
