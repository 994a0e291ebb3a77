"""Nets as a user would write them, for `--model.net tests.own_nets:NAME`."""

from torch import nn


def pooled_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))


def wrong_width(num_classes: int) -> nn.Module:
    return pooled_linear(num_classes + 1)
