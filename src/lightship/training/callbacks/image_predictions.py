"""Predictions of a few fixed validation images, logged after each validation."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightship.tracking.tracker import Tracker


class ImagePredictionLogger(Callback):
    """Logs images with predicted and true class by name.

    Rank 0 only, without collectives (see `ImageClassifier.probabilities`); keeps the modes of
    modules and random states.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int] | Tensor,
        ids: Sequence[int] | Tensor,
        class_names: Sequence[str],
        tracker: Tracker,
    ) -> None:
        """See the class.

        Args:
            images: [K, 3, H, W] uint8 RGB.
            labels: [K] class indices.
            ids: [K] positions in the validation split's manifest, shown with the image.
            class_names: name of each class index.
            tracker: where the images are logged.
        """
        self._images = images.cpu()
        self._labels = [int(label) for label in labels]
        self._ids = [int(sample_id) for sample_id in ids]
        self._class_names = class_names
        self._tracker = tracker

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict and log on rank 0."""
        if trainer.sanity_checking or not trainer.is_global_zero or not len(self._images):
            return
        with trainer.precision_plugin.forward_context():
            best = pl_module.probabilities(self._images).max(1)  # type: ignore[operator]
        names = self._class_names
        captions = [
            f"pred: {names[guess]} {probability:.2f} | true: {names[label]} | #{sample_id}"
            for guess, probability, label, sample_id in zip(
                best.indices.tolist(), best.values.tolist(), self._labels, self._ids, strict=True
            )
        ]
        pictures = list(self._images.permute(0, 2, 3, 1).numpy())
        self._tracker.log_images("val/predictions", pictures, captions, trainer.global_step)
