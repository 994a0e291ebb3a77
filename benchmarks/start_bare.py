"""A bare script: what one writes first, in plain PyTorch, on the images of the other arms."""

import json
import sys
import time
from itertools import chain, islice, repeat

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightship.models.nets.litcnn import litcnn


def main(root: str, steps: int, batch_size: int) -> None:
    began_s = time.perf_counter()
    prepare = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    train = ImageFolder(f"{root}/train", prepare)
    batches = DataLoader(train, batch_size, shuffle=True, num_workers=2, persistent_workers=True)
    net = litcnn(len(train.classes), 32)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    print("training", flush=True)
    epochs = chain.from_iterable(repeat(batches))
    for step, (images, labels) in enumerate(islice(epochs, steps), 1):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        if step == 1:
            print("first step", flush=True)
    net.eval()
    right, total = 0, 0
    with torch.no_grad():
        for images, labels in DataLoader(ImageFolder(f"{root}/test", prepare), 512, num_workers=2):
            right += int((net(images).argmax(1) == labels).sum())
            total += len(labels)
    print(json.dumps({"fit_s": time.perf_counter() - began_s, "test/acc": right / total}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
