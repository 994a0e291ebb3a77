"""A split decoded once and kept on the device: batches are cut there, without workers or copies."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightship import devices
from lightship.data.augment import Augment
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.shares import EvalShare, ListedShare, TrainShare

_IDS_AT_ONCE = 2**20


@dataclass
class ResidentSplit:
    """All images of a split on one device.

    Attributes:
        pixels: [N, S, S, 3] uint8: NHWC, so that cutting a batch moves whole images and the
            batch's [B, 3, S, S] view is channels_last already. Or features, [N, D] float32.
        labels: [N] int64, NOT_COUNTED where the image could not be read.
    """

    pixels: Tensor
    labels: Tensor

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, bad: np.ndarray, device: torch.device
    ) -> "ResidentSplit":
        """From decoded images [N, S, S, 3] uint8, labels [N] and a mask of unreadable ones [N].

        On a CPU contiguous images, as those of `decode_all`, are not copied.
        """
        counted = torch.from_numpy(np.where(bad, NOT_COUNTED, labels).astype(np.int64))
        pixels = torch.from_numpy(images).contiguous()
        return cls(pixels.to(device), counted.to(device))

    def take(self, ids: Tensor) -> Batch:
        """The samples `ids` [B] int64 (on the split's device) as a batch."""
        images = self.pixels.index_select(0, ids)
        if images.ndim == 4:
            images = images.permute(0, 3, 1, 2)
        return Batch(images, self.labels.index_select(0, ids), ids)


class _Rows:
    """The ids of a share's batches on a device, many brought there at once.

    Args:
        share: This rank's batches.
        device: Of the split.
    """

    def __init__(self, share: TrainShare | EvalShare | ListedShare, device: torch.device) -> None:
        self.share, self._device = share, devices.of(device)
        self._at_once = max(1, _IDS_AT_ONCE // share.batch_size)
        self._held: tuple[int, int] | None = None
        self._row: Callable[[int], Tensor]

    def ids(self, epoch: int, index: int) -> Tensor:
        """Of batch `index` of an epoch, [B] int64."""
        number, row = divmod(index, self._at_once)
        if self._held != (epoch, number):
            start = number * self._at_once
            stop = min(start + self._at_once, len(self.share))
            self._row = self._device.rows(torch.tensor(self.share.batches(epoch, start, stop)))
            self._held = epoch, number
        return self._row(row)


class ResidentTrainLoader:
    """Endless training batches whose place is asked for, never remembered.

    Args:
        split: The training split.
        share: This rank's batches.
        augment: Applied to each batch on the device.
        position: Gives (epoch, batch within it) of the next batch. Asked at every batch, so that a
            resumed trainer goes on in the middle of an epoch without skipping through it.
    """

    def __init__(
        self,
        split: ResidentSplit,
        share: TrainShare,
        augment: Augment,
        position: Callable[[], tuple[int, int]],
    ) -> None:
        self.split, self.share, self.augment = split, share, augment
        self.position = position
        self._rows = _Rows(share, split.labels.device)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, index = self.position()
            yield self.augment(self.split.take(self._rows.ids(epoch, index)), epoch)


class ResidentEvalLoader:
    """Every sample of a split exactly once over all ranks (see `EvalShare`)."""

    def __init__(self, split: ResidentSplit, share: EvalShare | ListedShare) -> None:
        self.split, self.share = split, share
        self._rows = _Rows(share, split.labels.device)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            ids = self._rows.ids(0, index)
            batch = self.split.take(ids.clamp(min=0))
            labels = torch.where(ids < 0, NOT_COUNTED, batch.labels)
            yield batch._replace(labels=labels, ids=ids)
