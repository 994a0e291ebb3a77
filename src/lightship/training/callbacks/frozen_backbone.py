"""A head alone on a frozen backbone: features are computed once, not in each epoch."""

import logging
from functools import partial
from typing import cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightship.config import Config, DataConfig
from lightship.console.display import Display
from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.errors import ConfigError
from lightship.models.classifier import ImageClassifier
from lightship.models.finetune import batch_norms
from lightship.models.head import Head, evaluation_mode
from lightship.training.features import compute_features

logger = logging.getLogger(__name__)
FLAG = "--model.freeze backbone"
_RANDOM = (
    "crop_padding_px", "crop_min_area", "flip", "cutout_px", "mixup_alpha", "cutmix_alpha",
    "sizes_px",
)  # fmt: skip
"""Settings of the data section that make an image another one in each epoch."""
_TOLERANCE = 0.03


def uses_features(config: Config) -> bool:
    """Whether each image gives the same features in every epoch, and in validation one."""
    model = config.model
    return (
        model.freeze == "backbone"
        and model.unfreeze_epoch is None
        and not any(getattr(config.data, name) for name in _RANDOM)
        and not (model.test_flip or model.test_shift)
    )


class FrozenBackbone(Callback):
    """Has a fit train and validate on features, computed before its first step.

    The result is the same within rounding. Not where the net ends in another way (see `Head`), the
    layers before the head are random in training (dropout), the features do not fit in
    data.resident_gib, or the fit sees fewer images than the set has.

    Args:
        data: The data section.
        features_url: Folder where features are kept (see `compute_features`).
        display: Shows progress.
    """

    def __init__(self, data: DataConfig, features_url: str, display: Display) -> None:
        self.data, self.features_url, self.display = data, features_url, display

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute features of train and val, on every rank. Blocks."""
        model = cast(ImageClassifier, pl_module)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        try:
            head = Head(model.net, model.hparams["net"], FLAG)
            reason = self._reason_against(trainer, model, head, data)
        except ConfigError as error:
            reason = str(error)
        if reason:
            logger.debug(f"features are not computed once: {reason}")
            return
        model.head = head
        for split in ("train", "val"):
            if split in data.manifests:
                ids = np.arange(len(data.manifests[split]))
                url = f"{self.features_url}/{split}"
                rows = compute_features(trainer, model, head, split, ids, url, self.display)
                values = comm.broadcast_array(rows.values if rows else None)
                labels = comm.broadcast_array(rows.labels if rows else None)
                data.use_features(
                    split, torch.from_numpy(values).to(model.device),
                    torch.from_numpy(labels).to(model.device),
                )  # fmt: skip
        logger.info(f"{FLAG}: features are computed once; epochs train on them")

    def _reason_against(
        self, trainer: Trainer, model: ImageClassifier, head: Head, data: ImageData
    ) -> str:
        """Why features cannot be used, or do not pay; empty if they do. The same on every rank."""
        sizes = [len(data.manifests[name]) for name in ("train", "val") if name in data.manifests]
        gib = sum(sizes) * head.width * 4 / 2**30
        if gib > self.data.resident_gib:
            return f"{gib:.1f} GiB, more than --data.resident_gib {self.data.resident_gib:g}"
        seen = float(trainer.estimated_stepping_batches) * self.data.global_batch_size
        if seen < sizes[0]:
            return "the run sees only a part of the images"
        images = data.examples("train", 8)[0].to(model.device)
        here = comm.on_every_rank(partial(_reason_here, trainer, model, head, images))
        return next(filter(None, comm.all_gather(here)), "")


def _reason_here(trainer: Trainer, model: ImageClassifier, head: Head, images: torch.Tensor) -> str:
    """Why features cannot be used, as this rank finds on some images; empty if they can."""
    if not len(images):
        return "no image to try them on can be read"
    with evaluation_mode(model.net), trainer.precision_plugin.forward_context():
        pixels = model.normalized(images)
        try:
            head.check(pixels)
        except ConfigError as error:
            return str(error)
        expected = head.features(pixels)
        model.net.train()
        model.freeze_for(trainer.current_epoch)
        if any(layer.training for layer in batch_norms(model.net)):
            return "a BatchNorm layer without weights follows the images"
        found = head.features(pixels)
    differ = (found - expected).abs().max() > _TOLERANCE * expected.abs().max()
    return "a layer is random in training" if bool(differ) else ""
