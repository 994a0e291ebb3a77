"""Nets as a user would write them, for `--model.net tests.support.own_nets:NAME`."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pooled_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))


def wrong_width(num_classes: int) -> nn.Module:
    return pooled_linear(num_classes + 1)


def moody(num_classes: int) -> nn.Module:
    """With what a restart could get wrong: dropout's random numbers, BatchNorm's buffers."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48, num_classes),
    )


def squeezed(num_classes: int) -> nn.Module:
    """BatchNorm gets one value of each image: in training it needs two images."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6, num_classes),
    )


def twenty_blocks(num_classes: int) -> nn.Module:
    """Small, with 122 tensors as a resnet18: 20 filters with BatchNorm, and a head `fc`."""
    blocks = OrderedDict()
    for number in range(20):
        conv = nn.Conv2d(3 if number == 0 else 8, 8, 3, padding=1, bias=False)
        blocks[f"block{number}"] = nn.Sequential(
            OrderedDict(conv=conv, bn=nn.BatchNorm2d(8), act=nn.ReLU())
        )
    blocks |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    return nn.Sequential(OrderedDict(**blocks, fc=nn.Linear(8, num_classes)))


def normalised_first(num_classes: int) -> nn.Module:
    """Begins with a layer whose weight is None."""
    return nn.Sequential(nn.InstanceNorm2d(3), *pooled_linear(num_classes))


def codes_first(num_classes: int) -> nn.Module:
    """Begins with a parameter of whole numbers."""
    first = nn.Identity()
    first.register_parameter("codes", nn.Parameter(torch.ones(2).int(), requires_grad=False))
    return nn.Sequential(first, *pooled_linear(num_classes))


def bulky(num_classes: int) -> nn.Module:
    """`moody` with weights enough (12 MB a checkpoint) that writing one takes a while."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48, 20_000),
        nn.ReLU(),
        nn.Linear(20_000, num_classes),
    )


class _OverLinear(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = pooled_linear(num_classes)


class _NaN(_OverLinear):
    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images) * float("nan")


def nan(num_classes: int) -> nn.Module:
    """Its outputs are no numbers."""
    return _NaN(num_classes)


class _NaNSoon(_OverLinear):
    """Sound for its first 6 training steps; its state does not tell how many it has done."""

    steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        return self.linear(images) * (float("nan") if self.steps > 6 else 1.0)


def nan_soon(num_classes: int) -> nn.Module:
    """Learns for an epoch and a half of 4 steps, then its outputs are no numbers."""
    return _NaNSoon(num_classes)


class _Branching(_OverLinear):
    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images)
        return logits if logits.mean() > 0 else -logits


def branching(num_classes: int) -> nn.Module:
    """Python decides by pixels what is computed, which cannot be traced."""
    return _Branching(num_classes)


class _ForPairs(_OverLinear):
    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.reshape(2, *images.shape[1:]))


def for_pairs(num_classes: int) -> nn.Module:
    """Takes two images at once, and no other number."""
    return _ForPairs(num_classes)


class _Restless(_OverLinear):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.linear(images), 0.5, training=True)


def restless(num_classes: int) -> nn.Module:
    """Draws random numbers in evaluation too."""
    return _Restless(num_classes)


class _Greedy(_OverLinear):
    """Asks for more memory than there are addresses, for a batch in training or evaluation."""

    def __init__(self, num_classes: int, in_training: bool) -> None:
        super().__init__(num_classes)
        self.in_training = in_training

    def forward(self, images: Tensor) -> Tensor:
        if self.training == self.in_training and len(images) > 8:  # a fit tries few before
            torch.empty(2**50, dtype=torch.uint8, device=images.device)
        return self.linear(images)


def greedy(num_classes: int) -> nn.Module:
    return _Greedy(num_classes, in_training=True)


def greedy_in_evaluation(num_classes: int) -> nn.Module:
    return _Greedy(num_classes, in_training=False)


def without_bias(num_classes: int) -> nn.Module:
    """Its last layer has no bias."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return net.append(nn.Linear(48, num_classes, bias=False))
