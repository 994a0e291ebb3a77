"""Arm `limit`: JPEGs in memory before the clock starts, decoded and cropped by two threads.

As the peers do it, or (mode `ours`) as lightship does.
"""

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.stream_arm import BATCH, SIZE_PX, WORKERS, pixels, run
from lightship.data.images.resize import decode_box

FILES = [path.read_bytes() for path in sorted(Path(sys.argv[1]).rglob("*.jpg"))]


def pixels_of_ours(data: bytes) -> torch.Tensor:
    """[3, 224, 224] uint8, lying HWC in memory: as `pixels` by lightship's decoder."""
    box = decode_box(data, "image", SIZE_PX, np.random.random((10, 4)), 0.08)
    image = torch.from_numpy(box).permute(2, 0, 1)
    return image.flip(2) if random.random() < 0.5 else image


class Batches:
    def __init__(self, mode: str) -> None:
        self.pixels = pixels_of_ours if mode == "ours" else pixels

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = random.sample(range(len(FILES)), len(FILES))
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead = [pool.submit(self.batch, part) for part in parts[: 2 * WORKERS]]
            for part in [*parts[2 * WORKERS :], *[None] * len(ahead)]:
                yield ahead.pop(0).result()
                if part:
                    ahead.append(pool.submit(self.batch, part))

    def batch(self, part: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [self.pixels(FILES[index]) for index in part]
        if images[0].is_contiguous():
            return torch.stack(images), torch.tensor(part)
        rows = torch.stack([image.permute(1, 2, 0) for image in images])
        return rows.permute(0, 3, 1, 2), torch.tensor(part)


if __name__ == "__main__":
    run(lambda root, mode, cache: Batches(mode))
