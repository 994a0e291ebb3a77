"""Exact evaluation: every sample counts once on any number of devices, padding does not count."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightship import devices
from lightship.data.batch import NOT_COUNTED

MAX_CONFUSION_CLASSES = 2048
"""No confusion matrix above this (int64, 32 MiB here)."""
LOGGED = ("loss", "acc", "balanced_acc", "f1", "top5")
"""Names of results that are logged for a split; those of `val` can choose the best checkpoint."""


class EvalMetrics(Metric):
    """Loss, accuracies, F1 and counts per class, summed on the device.

    `update` has static shapes and does not synchronize with the device. All sums except the loss
    are integers, so results do not depend on how samples are divided into batches and ranks. Every
    rank must have updated at least once (evaluation pads, so it has).

    Args:
        num_classes: C, the width of the logits.
        with_confusion: Also compute the confusion matrix (if C <= MAX_CONFUSION_CLASSES).

    Attributes:
        sum_over_ranks: All-reduces a tensor (sum), maybe in place; called by every rank in
            compute. None: one rank.
    """

    full_state_update = False
    loss_sum: Tensor
    support: Tensor
    hits: Tensor
    predictions: Tensor
    top5_hits: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int, with_confusion: bool = False) -> None:
        # torchmetrics finds other ranks through torch.distributed only, which XLA does not use.
        super().__init__(dist_sync_fn=self._summed, distributed_available_fn=self._has_peers)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.num_classes = num_classes
        self.with_confusion = with_confusion and num_classes <= MAX_CONFUSION_CLASSES
        states = {
            # Becomes float64 at the first update: not every device supports a float64 state.
            "loss_sum": torch.zeros((), dtype=torch.float32),
            "support": torch.zeros(num_classes, dtype=torch.int64),
            "hits": torch.zeros(num_classes, dtype=torch.int64),
            "predictions": torch.zeros(num_classes, dtype=torch.int64),
            "top5_hits": torch.zeros((), dtype=torch.int64),
        }
        if self.with_confusion:
            states["confusion"] = torch.zeros(num_classes**2, dtype=torch.int64)
        for key, zero in states.items():
            self.add_state(key, zero, dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [B, C] floating point, scores or log-probabilities.
            labels: [B] int64; rows of NOT_COUNTED do not count.
        """
        logits = logits.detach().float()
        counted = (labels != NOT_COUNTED).long()
        safe_labels = labels.clamp(min=0)
        predicted = logits.argmax(1)
        losses = F.cross_entropy(logits, labels, ignore_index=NOT_COUNTED, reduction="none")
        self.loss_sum = self.loss_sum + losses.sum(dtype=devices.of(logits.device).widest_float)
        self.support.scatter_add_(0, safe_labels, counted)
        self.hits.scatter_add_(0, safe_labels, counted * (predicted == labels))
        self.predictions.scatter_add_(0, predicted, counted)
        if self.num_classes > 5:
            in_top5 = (logits.topk(5, dim=1).indices == labels[:, None]).any(1)
            self.top5_hits += (counted * in_top5).sum()
        if self.with_confusion:
            self.confusion.scatter_add_(0, safe_labels * self.num_classes + predicted, counted)

    def _has_peers(self) -> bool:
        return self.sum_over_ranks is not None

    def _summed(self, state: Tensor, group: object = None) -> list[Tensor]:
        # torchmetrics would gather every rank's matrix, then add; a list of one is the sum.
        assert self.sum_over_ranks is not None
        return [self.sum_over_ranks(state.clone())]

    def compute(self) -> dict[str, Tensor]:
        """The results over all ranks; NaN where nothing was counted.

        Means over classes are scikit-learn's: `balanced_acc`, of the accuracy of each class, is
        over the classes that have samples; `f1` (macro) over those that have samples or were
        predicted.

        Returns:
            loss, acc, balanced_acc, f1, top5 (only if C > 5) and num_samples: scalars; support: [C]
            int64; per_class_acc: [C]; confusion, if computed: [C, C] int64, rows are true classes.
        """
        wide = devices.of(self.support.device).widest_float
        hits, support = self.hits.to(wide), self.support.to(wide)
        num_samples = support.sum()
        seen = support + self.predictions.to(wide)
        results = {
            "loss": self.loss_sum.to(wide) / num_samples,
            "acc": hits.sum() / num_samples,
            "balanced_acc": _mean_ratio(hits, support),
            "f1": _mean_ratio(2 * hits, seen),
            "num_samples": num_samples,
            "support": self.support,
            "per_class_acc": hits / support,
        }
        if self.num_classes > 5:
            results["top5"] = self.top5_hits.to(wide) / num_samples
        if self.with_confusion:
            results["confusion"] = self.confusion.view(self.num_classes, self.num_classes)
        return results


def _mean_ratio(parts: Tensor, wholes: Tensor) -> Tensor:
    """Mean of parts / wholes, both [C], over the classes whose whole is not 0; NaN if all are."""
    return (parts / wholes.clamp(min=1)).sum() / (wholes > 0).sum()
