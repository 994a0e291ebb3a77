"""The training loss of a batch, and weights for classes of unequal size."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightship.data.batch import NOT_COUNTED
from lightship.data.label_counts import count_labels

_LEAST = 1e-6
"""Of 1 - p: a root of it has no gradient at 0."""


class TrainingLoss:
    """Cross-entropy or focal loss in float32, with label smoothing and a weight for each class.

    The weights are applied as by torch's cross_entropy: to each class's term of the (smoothed)
    target. A mean over a batch is over its rows, not over their weights, so that ranks and parts
    add up to the global batch.

    Args:
        name: `cross_entropy`, or `focal`: each class's term is multiplied by (1 - p)**gamma, with p
            the probability of that class (Lin et al. 2017, arXiv 1708.02002, equation 5, with
            softmax).
        focal_gamma: Its gamma; at 0 it is cross-entropy.
        label_smoothing: Probability mass of the target spread over all classes.
        class_weights: [C]; None: all 1.
    """

    def __init__(
        self,
        name: str = "cross_entropy",
        focal_gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.name, self.focal_gamma, self.label_smoothing = name, focal_gamma, label_smoothing
        # No buffer: DDP would broadcast it in each step, and a half-precision run would round it.
        self.class_weights = (
            None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )

    def __call__(self, logits: Tensor, labels: Tensor, reduction: Literal["none", "sum"]) -> Tensor:
        """Losses of rows, [B], or their sum; 0 for rows that do not count.

        Args:
            logits: [B, C] float32.
            labels: [B] int64.
            reduction: Of the rows.
        """
        weights = self.class_weights
        if weights is not None and weights.device != logits.device:
            weights = self.class_weights = weights.to(logits.device)
        if self.name == "focal":
            losses = self._focal(logits, labels, weights)
            return losses.sum() if reduction == "sum" else losses
        return F.cross_entropy(
            logits,
            labels,
            weights,
            ignore_index=NOT_COUNTED,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    def _focal(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        scores = logits.log_softmax(1)
        terms = (-scores.expm1()).clamp(min=_LEAST) ** self.focal_gamma * scores
        losses = F.nll_loss(terms, labels, weights, ignore_index=NOT_COUNTED, reduction="none")
        if not self.label_smoothing:
            return losses
        spread = -(terms if weights is None else terms * weights).mean(1)
        return torch.lerp(losses, spread * (labels != NOT_COUNTED), self.label_smoothing)


def balanced_weights(labels: np.ndarray, num_classes: int) -> list[float]:
    """Weights with which each class counts as much as any other; their mean over samples is 1.

    N / (K n) for a class of n samples, of N in K classes that have any (scikit-learn's
    `compute_class_weight`); 0 for a class without samples.

    Args:
        labels: [N], any integer type; counted in pieces.
        num_classes: C, at least K.

    Returns:
        [C].
    """
    counts = count_labels(labels, num_classes)[1:]
    each = len(labels) / int(np.count_nonzero(counts))
    return [each / count if count else 0.0 for count in counts.tolist()]


def weights_line(weights: Sequence[float], class_names: Sequence[str]) -> str:
    """The smallest and the largest of balanced weights, and the classes without images."""
    used = [(weight, name) for weight, name in zip(weights, class_names, strict=True) if weight]
    (low, common), (high, rare) = min(used), max(used)
    line = f"class weights: {low:.3g} ({common}) to {high:.3g} ({rare})"
    empty = [name for weight, name in zip(weights, class_names, strict=True) if not weight]
    if not empty:
        return line
    shown = ", ".join(empty[:5]) + (f", ... ({len(empty)})" if len(empty) > 5 else "")
    return f"{line}; 0 for classes without training images: {shown}"
