"""What travels from the data to the model: one batch."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a data worker does without torch
    from torch import Tensor

NOT_COUNTED = -1
"""Label of a row that counts nowhere: padding of an evaluation batch, or a skipped bad image."""


class Batch(NamedTuple):
    """One device's share of a step, all tensors on one device.

    Shapes are the same for every batch of a loader (the last is padded), so that a compiled net
    compiles once.
    """

    images: "Tensor"
    """[B, 3, H, W], RGB in 0..255: uint8, or float32 where pairs were blended. Or [B, D] float32:
    what a frozen backbone gives for the images."""
    labels: "Tensor"
    """[B] int64 class indices; NOT_COUNTED where the row must not count."""
    ids: "Tensor"
    """[B] int64 positions in the split's manifest; NOT_COUNTED in padding."""
    mixed_labels: "Tensor | None" = None
    """[B] int64 labels of the image mixed in (mixup, cutmix)."""
    mix_weight: "Tensor | None" = None
    """[B] float32 share of `labels` in the loss; the rest is that of `mixed_labels`."""
