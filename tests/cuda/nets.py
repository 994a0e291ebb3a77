"""Nets of these tests, for `--model.net tests.cuda.nets:NAME`."""

import torch
from torch import Tensor, nn


def convolutions(num_classes: int, dropout: float = 0.3) -> nn.Module:
    """With what is not deterministic by itself on a GPU, or kept wrongly by a restart."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, num_classes),
    )


class _Wrapped(nn.Module):
    """Has a `forward` of its own: torch 2.11 compiles none of nn.Sequential."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def without_chance(num_classes: int) -> nn.Module:
    """The same without dropout, whose random numbers are others when it is compiled."""
    return _Wrapped(convolutions(num_classes, dropout=0.0))


class _Noting(nn.Module):
    """Notes the dtype in which its convolution computes."""

    seen: set[torch.dtype] = set()  # noqa: RUF012 - of all instances: a fit builds its own

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, stride=2), nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        if self.training and torch.is_grad_enabled():  # not a fit's check before training
            self.seen.add(maps.dtype)
        return self.head(maps.relu().mean((2, 3)))


def noting(num_classes: int) -> nn.Module:
    return _Noting(num_classes)
