"""A bare script on images in S3: plain PyTorch over s3fs, without validation."""

import sys
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from benchmarks.stream_arm import decoded
from benchmarks.stream_s3fs import Batched
from lightship.models.nets.litcnn import litcnn

SIZE_PX = 64


class Small(Batched):
    """Parts of the images, of 64 px."""

    crop = RandomResizedCrop(SIZE_PX, (0.3, 1.0), antialias=True)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        files = self.store().cat([self.paths[index] for index in indices], batch_size=64)
        images = (self.crop(decoded(files[self.paths[index]])) for index in indices)
        return list(zip(images, (self.labels[index] for index in indices), strict=True))


def main(root: str, steps: int, batch_size: int, out: str) -> None:
    train = Small(root)
    batches = DataLoader(
        train, batch_size, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    )
    net = litcnn(max(train.labels) + 1, SIZE_PX)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    print("training", flush=True)
    epochs = chain.from_iterable(repeat(batches))
    for step, (images, labels) in enumerate(islice(epochs, steps), 1):
        optimizer.zero_grad()
        F.cross_entropy(net(images / 127.5 - 1), labels).backward()
        optimizer.step()
        if step == 1:
            print("first step", flush=True)
    torch.save(net.state_dict(), f"{out}.pth")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
