"""Arm `limit`: JPEGs in memory before the clock starts, decoded and cropped by two threads."""

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.benchmarks.stream_arm import BATCH, WORKERS, pixels, run

FILES = [path.read_bytes() for path in sorted(Path(sys.argv[1]).rglob("*.jpg"))]


class Batches:
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
        return torch.stack([pixels(FILES[index]) for index in part]), torch.tensor(part)


if __name__ == "__main__":
    run(lambda root, mode, cache: Batches())
