"""Nets as a user would write them, for `--model.net tests.own_nets:NAME`."""

from torch import nn


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
