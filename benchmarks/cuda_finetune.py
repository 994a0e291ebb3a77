"""Part `finetune`: images a second of two nets on TrashNet: lightship, timm's loop, a bare loop.

timm's arm is the loop of its train.py with its own loader, transform, optimizer and loss. All arms:
random resized crops and flips, batch size and net the same, bf16, NHWC, AdamW.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageDataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

from benchmarks import cuda_data, one_fit
from benchmarks.cuda_part import LIMIT, Job

_NETS = ("tf_efficientnet_lite0", "vit_base_patch16_224")
_TOY_NETS = ("test_vit",)
_COPIES = 8
_CLASSES = 6


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """Each net's three arms; weights are random, which no rate depends on."""
    root = cuda_data.trashnet(job.data, job.folder, job.is_toy, _COPIES)
    if root is None:
        yield {"arm": "", "note": f"not run: no {cuda_data.TRASHNET} (make cuda-data)"}
        return
    steps, batch = (3, 4) if job.is_toy else (80, 64)
    for name in _TOY_NETS if job.is_toy else _NETS:
        size_px = timm.get_pretrained_cfg(name).input_size[-1]
        common = {"of": name, "note": f"batch {batch}, {size_px} px, bf16"}
        rate = bare(name, size_px, batch, steps, job.is_toy)
        yield {"arm": f"{name}: bare loop, one batch (limit)", LIMIT: True, **common,
               "images_per_s": [rate]}  # fmt: skip
        yield {"arm": f"{name}: lightship fit, streamed", **common,
               "images_per_s": [lightship(job, root, name, size_px, batch, steps)]}  # fmt: skip
        yield {"arm": f"{name}: timm's loop", **common,
               "images_per_s": [timms(root, name, size_px, batch, steps, job.is_toy)]}  # fmt: skip


def lightship(job: Job, root: str, name: str, size_px: int, batch: int, steps: int) -> float:
    """Images a second of a fit's steps after the first."""
    weights = f"{job.folder}/{name}.safetensors"
    save_file(timm.create_model(name).state_dict(), weights)
    run = one_fit.measure(f"{job.folder}/run-{name}", [
        f"--data.root={root}", f"--model.net=timm:{name}", f"--model.weights={weights}",
        f"--data.image_size_px={size_px}", "--data.crop_min_area=0.08", "--data.flip=true",
        f"--data.global_batch_size={batch}", "--data.val_fraction=0", "--data.eval_batch_size=64",
        "--model.channels_last=true", "--model.label_smoothing=0.1", "--optim.name=adamw",
        "--optim.lr=0.0001", "--trainer.precision=bf16-mixed", f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1", "--run.tracking=none", "--run.log_images=0", *job.accelerator,
    ])  # fmt: skip
    return batch / run["step_s"]


def model(name: str, device: torch.device) -> nn.Module:
    net = timm.create_model(name, num_classes=_CLASSES)
    return net.to(device, memory_format=torch.channels_last).train()


def timms(root: str, name: str, size_px: int, batch: int, steps: int, is_toy: bool) -> float:
    """Images a second of timm's loop, its loader's processes included."""
    device = torch.device("cpu" if is_toy else "cuda")
    net = model(name, device)
    loader = create_loader(
        ImageDataset(f"{root}/train"), input_size=(3, size_px, size_px), batch_size=batch,
        is_training=True, use_prefetcher=not is_toy, color_jitter=None, interpolation="bilinear",
        num_workers=min(16, len(os.sched_getaffinity(0))), pin_memory=not is_toy,
        persistent_workers=True, device=device,
    )  # fmt: skip
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-4, weight_decay=0.01)
    loss_of = LabelSmoothingCrossEntropy(0.1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    return _rate(step, batches(), batch, steps, device)


def bare(name: str, size_px: int, batch: int, steps: int, is_toy: bool) -> float:
    """Images a second over one batch that stays on the device."""
    device = torch.device("cpu" if is_toy else "cuda")
    net = model(name, device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    shape = (batch, 3, size_px, size_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, _CLASSES, (batch,), device=device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(images.float() / 128 - 1)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def batches() -> Iterator[Any]:
        while True:
            yield images, labels

    return _rate(step, batches(), batch, steps, device)


def _rate(step: Any, batches: Iterator[Any], batch: int, steps: int, device: torch.device) -> float:
    """Images a second of all steps but the first ones, as one_fit counts them."""
    first = 10 if device.type == "cuda" else 2
    for number in range(steps):
        if number == first:
            _finish(device)
            began_s = time.perf_counter()
        step(*next(batches))
    _finish(device)
    return batch * (steps - first) / (time.perf_counter() - began_s)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
