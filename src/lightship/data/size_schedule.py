"""Training on small images first (progressive resizing), as a function of the epoch.

As in fast.ai's DAWNBench entry (Howard 2018) and EfficientNetV2 (Tan & Le 2021, arXiv:2104.00298);
that random crops are shown smaller than the images of an evaluation suits the net (Touvron et al.
2019, arXiv:1906.06423).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SizeSchedule:
    """The side of the training images in each epoch.

    Attributes:
        sizes_px: The sides, for parts of the run that are equally long, to whole epochs.
        epochs: Of the run, at least 1.
    """

    sizes_px: Sequence[int]
    epochs: int

    def at(self, epoch: int) -> int:
        """The side in an epoch, in pixels; in the last one, and after it, the last side."""
        count = len(self.sizes_px)
        part = ((epoch + 1) * count - 1) // self.epochs
        return self.sizes_px[min(part, count - 1)]

    def end_of_size(self, epoch: int) -> int:
        """The first epoch after `epoch` with another side; the run's end if there is none."""
        later = (other for other in range(epoch, self.epochs) if self.at(other) != self.at(epoch))
        return next(later, self.epochs)
