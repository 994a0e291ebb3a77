"""What the arms of the stream table share: decoding and cropping, the clock, the last line.

An arm's module imports what it needs at its top (not timed), and ends in `run(open_batches)`.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import horizontal_flip_image, resized_crop_image

from benchmarks.process_tree import cpu_s

BATCH, SIZE_PX = int(os.environ.get("BATCH", "128")), 224
EARLY_BATCHES = 20
WORKERS = int(os.environ.get("WORKERS", "2"))
warnings.filterwarnings("ignore", "The given buffer is not writable")


def decoded(data: bytes) -> torch.Tensor:
    """[3, H, W] uint8 of a JPEG."""
    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)


def cropped(image: torch.Tensor) -> torch.Tensor:
    """[3, 224, 224] uint8: a random part of [3, H, W], scaled, mirrored every other time."""
    top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    image = resized_crop_image(image, top, left, height, width, [SIZE_PX, SIZE_PX])
    return horizontal_flip_image(image) if torch.rand(()) < 0.5 else image


def pixels(data: bytes) -> torch.Tensor:
    """What the network gets of a JPEG: [3, 224, 224] uint8."""
    return cropped(decoded(data))


def run(open_batches: Callable[[str, str, str], Iterable[Any]]) -> None:
    """Time the arm that sys.argv describes: ROOT MODE CACHE EPOCHS LIMIT_S.

    `open_batches(ROOT, MODE, CACHE)` builds the loader of (images [n, 3, 224, 224], labels [n])
    that is iterated once an epoch; CACHE is a new empty folder for what the loader keeps on disk.
    Early are the second batch to the twentieth, timed from the first one on. An epoch that takes
    longer than LIMIT_S ends there. The last line printed is the result.
    """
    root, mode, cache, epochs, limit_s = sys.argv[1:]
    result: dict[str, float] = {"images": 0, "early_images": 0}
    cpu_before_s, began_s = cpu_s(os.getpid()), time.perf_counter()
    batches, number = open_batches(root, mode, cache), 0
    for epoch in range(1, int(epochs) + 1):
        seen, epoch_began_s = 0, began_s if epoch == 1 else time.perf_counter()
        for images, labels in batches:
            assert images.shape == (len(labels), 3, SIZE_PX, SIZE_PX), images.shape
            now_s = time.perf_counter()
            result.setdefault("first_batch_s", now_s - began_s)
            seen += len(labels)
            if epoch == 1 and 2 <= (number := number + 1) <= EARLY_BATCHES:
                result["early_images"] += len(labels)
                result["early_s"] = now_s - began_s - result["first_batch_s"]
            if now_s - epoch_began_s > float(limit_s):
                result["cut_short"] = True
                break
        result[f"epoch{epoch}_s"] = time.perf_counter() - epoch_began_s
        result[f"epoch{epoch}_images"] = seen
        result["images"] += seen
    result["cpu_s"] = cpu_s(os.getpid()) - cpu_before_s
    print(json.dumps(result), flush=True)
