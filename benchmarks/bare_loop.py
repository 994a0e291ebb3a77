"""The limit: litcnn in a plain PyTorch loop on random pixels in memory; nothing else."""

import json
import sys
import time

import torch
import torch.nn.functional as F

from lightship.models.nets.litcnn import litcnn


def main(batch_size: int, channels_last: bool, bf16: bool, images: int) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = litcnn(10, 32).to(memory_format=memory_format)
    optimizer = torch.optim.Adam(net.parameters(), 2e-4)
    pixels = torch.randn(batch_size, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(0, 10, (batch_size,))
    steps = images // batch_size
    for step in range(steps + 5):
        if step == 5:  # the first steps choose kernels and allocate
            began_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(pixels)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    spent_s = time.perf_counter() - began_s
    print(json.dumps({"images": steps * batch_size, "fit_s": spent_s}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1", int(sys.argv[4]))
