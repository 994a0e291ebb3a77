"""What the arms of `finetune` share: the same images, net, weights and measure."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

NET = "tf_efficientnet_lite0"


class Images(Dataset):
    """(transformed image, label) of a split."""

    def __init__(self, samples: list[tuple[str, int]], transform: Callable[[Any], Any]) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        path, label = self.samples[i]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def splits(path: str) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """train, val and test as (path, label), and the classes: from the file of finetune.py."""
    found = json.loads(Path(path).read_text())
    return found["splits"], found["classes"]


def pretrained(weights: str, classes: int) -> nn.Module:
    """The net with its ImageNet weights and a new last layer."""
    net = timm.create_model(NET)
    net.load_state_dict(load_file(weights))
    net.reset_classifier(classes)
    return net


@torch.no_grad()
def scores(net: nn.Module, loader: Any, classes: int) -> dict[str, float]:
    """Accuracy and macro F1 of (images, labels) batches."""
    net.eval()
    counts = np.zeros((classes, classes), dtype=np.int64)
    for images, labels in loader:
        np.add.at(counts, (labels.numpy(), net(images).argmax(1).numpy()), 1)
    return {"acc": float(np.trace(counts) / counts.sum()), "macro_f1": macro_f1(counts)}


def macro_f1(counts: np.ndarray) -> float:
    """The mean over the classes of F1, of a confusion matrix (true class by row)."""
    return float((2 * np.diag(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)).mean())


def report(began_s: float, net: nn.Module, loader: Any, classes: int) -> None:
    """Prints an arm's numbers as JSON: the end of its process."""
    fit_s = time.perf_counter() - began_s
    print(json.dumps({**scores(net, loader, classes), "fit_s": fit_s}))
