"""The limit: speednet in a plain loop over lightship's own batches, optimizer and schedule."""

import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from lightship.data.augment import Augment
from lightship.data.order import Shuffle
from lightship.data.resident import ResidentSplit, ResidentTrainLoader
from lightship.data.sample_decoder import decode_all
from lightship.data.shares import TrainShare
from lightship.data.sources import layouts
from lightship.models.nets.speednet import speednet
from lightship.models.optim.build import SGDPart, build_optimizer, build_schedule

BATCH = int(os.environ.get("BATCH", "2000"))
_WARM_UP = 2


def measure(root: str, steps: int, bf16: bool) -> dict[str, float]:
    """Images and seconds of `steps`, after a few that do not count."""
    manifest = layouts.scan(root)["train"]
    images, skipped = decode_all(manifest, threads=len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = ResidentSplit.from_arrays(images, manifest.label, np.zeros(len(images), bool), device)
    assert not skipped.reasons
    share = TrainShare(Shuffle(len(manifest), BATCH, 0), 0, 1, 1)
    augment = Augment(0, crop_padding_px=2, flip=True, flip_in_turn=True)
    done = iter(range(10**9))
    loader = ResidentTrainLoader(split, share, augment, lambda: divmod(next(done), len(share)))

    torch.manual_seed(0)
    net = speednet(10, 32)
    pixels = torch.from_numpy(images[:5000]).permute(0, 3, 1, 2).float() / 128 - 1
    net.init_from_images(pixels)
    net.to(device, memory_format=torch.channels_last)
    rest = SGDPart(lr=106, head_lr=1340)
    optimizer = build_optimizer(net, "muon-sgd", 0.24, 0.6, 0.004, rest=rest)
    schedule = build_schedule(optimizer, steps, "linear")
    for step, batch in zip(range(steps + _WARM_UP), loader, strict=False):
        if step == _WARM_UP:
            _finish(device)
            began_s = time.perf_counter()
        x = (batch.images.float() / 128 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _finish(device)
    return {"images": steps * BATCH, "train_s": time.perf_counter() - began_s}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")))
