"""The prediction for each evaluated image: kept on the device, fetched once at the end."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightship.data.batch import NOT_COUNTED, Batch

COLUMNS = ("id", "label", "guess", "probability", "loss")


class Outcomes:
    """One row per image (32 bytes; ten million images: 320 MB). Only `take` synchronizes.

    Each rank holds the rows of its own batches.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, batch: Batch, log_probabilities: Tensor) -> None:
        """Add a batch.

        Args:
            batch: Its ids, [B] int64, and labels, [B] int64; rows of NOT_COUNTED do not count.
            log_probabilities: [B, C] float32.
        """
        best, guess = log_probabilities.max(1)
        losses = F.nll_loss(
            log_probabilities, batch.labels, ignore_index=NOT_COUNTED, reduction="none"
        )
        # Outputs that are not finite: probability 0, loss infinity.
        probability = best.exp().nan_to_num(0)
        losses = losses.masked_fill(losses.isnan(), math.inf)  # XLA's nan_to_num takes no infinity
        self._batches.append((batch.ids, batch.labels, guess, probability, losses))

    def take(self) -> dict[str, np.ndarray]:
        """The counted rows by column name: id, label, guess [N] int64; probability, loss [N]
        float32. Resets the rows."""
        columns = [torch.cat(parts).cpu().numpy() for parts in zip(*self._batches, strict=True)]
        self._batches = []
        if not columns:
            kinds = (np.int64, np.int64, np.int64, np.float32, np.float32)
            columns = [np.zeros(0, kind) for kind in kinds]
        counted = columns[1] != NOT_COUNTED
        return {name: column[counted] for name, column in zip(COLUMNS, columns, strict=True)}
