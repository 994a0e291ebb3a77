"""Nets whose gradient does not depend on how a global batch is shared out."""

import os
import time

import torch
from torch import Tensor, nn


def plain(num_classes: int) -> nn.Module:
    """Convolutions without BatchNorm or dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def normed(num_classes: int) -> nn.Module:
    """With running statistics, which differ from rank to rank in training."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def large(num_classes: int) -> nn.Module:
    """14 MB of gradients: more than one DDP bucket."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 2048),
        nn.ReLU(),
        nn.Linear(2048, 1600),
        nn.ReLU(),
        nn.Linear(1600, num_classes),
    )


class _Sleepy(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = plain(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.7 if self.training else 0)
        return self.net(images)


def sleepy(num_classes: int) -> nn.Module:
    """With a step of 0.7 s."""
    return _Sleepy(num_classes)


class _FailsOnRank1(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = plain(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and os.environ.get("RANK") == "1":
            raise ArithmeticError("broken on purpose")
        return self.net(images)


def fails_on_rank_1(num_classes: int) -> nn.Module:
    """A bug that one rank alone meets."""
    return _FailsOnRank1(num_classes)
