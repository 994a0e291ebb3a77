"""The peer: a fine-tuning as timm's train.py does it, by timm's own parts, on the same images.

Source: timm's train.py (not in its package) with the flags that its documentation and hub give for
fine-tuning: --opt adamw --lr 5e-5 --weight-decay 0.05 --layer-decay 0.75 --sched cosine
--warmup-epochs 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --smoothing 0.1, batch 16. The magnitude
is bounded by 9 (mmax9): above, timm asks for images of 0 bits, which Pillow 13 refuses.
"""

import sys
import time
from copy import deepcopy

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

from benchmarks.finetune_data import NET, Images, pretrained, report, scores, splits


def main(root: str, weights: str, seed: int, epochs: int) -> None:
    timm.utils.random_seed(seed)
    samples, classes = splits(root)
    model = pretrained(weights, len(classes))
    config = resolve_data_config({}, model=timm.create_model(NET))
    shown = create_transform(**config)
    augmented = create_transform(
        **config, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1", re_prob=0.25
    )
    train = DataLoader(
        Images(samples["train"], augmented), batch_size=16, shuffle=True, drop_last=True,
        num_workers=2,
    )  # fmt: skip
    val = DataLoader(Images(samples["val"], shown), batch_size=64, num_workers=2)
    test = DataLoader(Images(samples["test"], shown), batch_size=64, num_workers=2)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=5e-5, weight_decay=0.05, layer_decay=0.75
    )
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-7
    )
    criterion = LabelSmoothingCrossEntropy(0.1)
    began_s = time.perf_counter()
    best, best_acc = deepcopy(model.state_dict()), 0.0
    for epoch in range(epochs):
        model.train()
        scheduler.step(epoch)
        for images, labels in train:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
        if (acc := scores(model, val, len(classes))["acc"]) > best_acc:
            best_acc, best = acc, deepcopy(model.state_dict())
    model.load_state_dict(best)
    report(began_s, model, test, len(classes))


if __name__ == "__main__":
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
