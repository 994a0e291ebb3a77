"""A split decoded once and kept on the device: batches are cut there, without workers or copies."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightship import devices
from lightship.data.augment import Augment
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.order import EvalShare, ListedShare, TrainShare


@dataclass
class ResidentSplit:
    """All images of a split on one device.

    Attributes:
        pixels: [N, S, S, 3] uint8: NHWC, so that cutting a batch moves whole images and the
            batch's [B, 3, S, S] view is channels_last already.
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
        images = self.pixels.index_select(0, ids).permute(0, 3, 1, 2)
        return Batch(images, self.labels.index_select(0, ids), ids)


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
        self._epoch_rows: tuple[int, Callable[[int], Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, index = self.position()
            yield self.augment(self.split.take(self._ids_of(epoch)(index)), epoch)

    def _ids_of(self, epoch: int) -> Callable[[int], Tensor]:
        """This rank's ids in an epoch: of batch k, [B] on the device."""
        if self._epoch_rows is None or self._epoch_rows[0] != epoch:
            ids = torch.tensor(self.share.epoch(epoch))
            self._epoch_rows = epoch, devices.of(self.split.labels.device).rows(ids)
        return self._epoch_rows[1]


class ResidentEvalLoader:
    """Every sample of a split exactly once over all ranks (see `EvalShare`)."""

    def __init__(self, split: ResidentSplit, share: EvalShare | ListedShare) -> None:
        self.split, self.share = split, share
        self.ids = devices.of(split.labels.device).rows(torch.from_numpy(share.epoch(0)))

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Batch]:
        for ids in map(self.ids, range(len(self))):
            batch = self.split.take(ids.clamp(min=0))
            labels = torch.where(ids < 0, NOT_COUNTED, batch.labels)
            yield batch._replace(labels=labels, ids=ids)
