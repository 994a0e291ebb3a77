"""The peer of several processes: litcnn in a plain PyTorch DDP loop on random pixels in memory.

torchrun --nproc-per-node N -m benchmarks.bare_ddp BATCH_A_PROCESS STEPS
"""

import json
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from lightship.models.nets.litcnn import litcnn

WARM_UP_STEPS = 10


def main(batch_size: int, steps: int) -> None:
    dist.init_process_group("gloo")
    net = DistributedDataParallel(litcnn(10, 32), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=True)
    pixels = torch.randn(batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (batch_size,))
    for step in range(steps + WARM_UP_STEPS):
        if step == WARM_UP_STEPS:
            began_s = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(pixels), labels).backward()
        optimizer.step()
    spent_s = time.perf_counter() - began_s
    if dist.get_rank() == 0:
        images = batch_size * dist.get_world_size() * steps
        print(json.dumps({"images_per_s": images / spent_s}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
