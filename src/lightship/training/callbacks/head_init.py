"""The initial weights of the head: fitted to the features that it gets."""

import logging
from time import monotonic
from typing import cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship.console.display import Display
from lightship.data.batch import NOT_COUNTED
from lightship.data.feature_store import Rows
from lightship.data.label_counts import count_labels
from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.errors import DataError
from lightship.models.classifier import ImageClassifier
from lightship.models.discriminant import fit_discriminant
from lightship.models.head import Head
from lightship.models.logistic import MAX_PRODUCTS, fit_logistic
from lightship.models.losses import TrainingLoss
from lightship.training.features import balanced_ids, compute_features

logger = logging.getLogger(__name__)
FLAG = "--model.head_init features"


class HeadInit(Callback):
    """Fits the head before the first step of a fit, the same on every rank.

    By `fit_logistic`, or `fit_discriminant` where that would take too long.

    Goes before EMA, whose average starts from the weights.

    Args:
        features_url: Folder where features are kept (see `compute_features`).
        display: Shows progress.
    """

    def __init__(self, features_url: str, display: Display) -> None:
        self.features_url, self.display = features_url, display

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute features, fit and set the head; nothing in a resumed fit. Every rank; blocks."""
        if trainer.ckpt_path is not None:
            return
        model, began_s = cast(ImageClassifier, pl_module), monotonic()
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        head = Head(model.net, model.hparams["net"], FLAG)
        labels = data.manifests["train"].label
        counts = count_labels(labels, len(model.class_names))[1:]
        ids = balanced_ids(labels, counts)
        folder = "train" if len(ids) == len(labels) else "sample"
        url = f"{self.features_url}/{folder}"
        rows = compute_features(trainer, model, head, "train", ids, url, self.display)

        def fitted() -> tuple[np.ndarray, np.ndarray, str]:
            assert rows is not None
            return _fitted(rows, counts, model.training_loss)

        fit = comm.on_rank_0(fitted)
        line = comm.broadcast_from_rank_0(lambda: fit[2] if fit else "")
        weight = comm.broadcast_array(fit[0] if fit else None)
        bias = comm.broadcast_array(fit[1] if fit else None)
        head.set(torch.from_numpy(weight), torch.from_numpy(bias))
        of = f"{len(ids):,} of {len(labels):,}" if len(ids) < len(labels) else f"{len(ids):,}"
        spent_s = monotonic() - began_s
        logger.info(f"{FLAG}: from {of} training images; {line}; {spent_s:.1f} s")


def _fitted(
    rows: Rows, counts: np.ndarray, loss: TrainingLoss
) -> tuple[np.ndarray, np.ndarray, str]:
    """Fit the head to features.

    Args:
        rows: Features and labels of some training images.
        counts: [C] int64, all training images of each class.
        loss: Of the training.

    Returns:
        (weight [C, D] float32, bias [C] float32, how well it fits, in words).
    """
    is_good = (rows.labels != NOT_COUNTED) & np.isfinite(rows.values).all(axis=1)
    if not is_good.any():
        raise DataError(f"{FLAG}: none of {len(is_good)} training images has finite features")
    kept, num_classes = rows.labels[is_good], len(counts)
    # What was taken of a class stands for all of it.
    taken = np.bincount(kept, minlength=num_classes)
    shares = counts / np.maximum(taken, 1)
    weights = torch.from_numpy(shares[kept] / shares[kept].mean())
    values, targets = torch.from_numpy(rows.values[is_good]), torch.from_numpy(kept)
    if values.shape[0] * values.shape[1] * num_classes <= MAX_PRODUCTS:
        fit = fit_logistic(
            values, targets, num_classes, weights, loss.label_smoothing, loss.class_weights
        )
        line = f"L2 {fit.strength:g}"
    else:
        fit = fit_discriminant(values, targets, num_classes, weights, loss.class_weights)
        line = (
            f"too much for logistic regression ({len(values):,} images x {values.shape[1]:,} "
            f"features x {num_classes:,} classes, at most {MAX_PRODUCTS:.0e}): linear "
            f"discriminant analysis, shrinkage {fit.strength:g}"
        )
    line += f", held-out accuracy {fit.accuracy:.3f}"
    return fit.weight.float().numpy(), fit.bias.float().numpy(), line
