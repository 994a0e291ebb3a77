"""What the net says of a few fixed validation images, after each validation."""

from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightship.tracking import Tracker

_IMAGES_AT_ONCE = 64


class PredictionLogger(Callback):
    """Logs images with predicted and true class by name, and keeps the last for the report.

    Rank 0 predicts alone with the module's own forward (no collective), in eval mode, without
    gradients and uncompiled (its batch has a shape of its own, which torch.compile would compile
    for); modes of modules and random states are left as they were. One device fetch a validation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int] | Tensor,
        ids: Sequence[int] | Tensor,
        class_names: Sequence[str],
        tracker: Tracker | None,
    ) -> None:
        """See the class.

        Args:
            images: [K, 3, H, W] uint8 RGB.
            labels: [K] class indices.
            ids: [K] positions in the validation split's manifest, shown with the image.
            class_names: name of each class index.
            tracker: where the images are logged; None: nowhere.
        """
        self._images = images.cpu()
        self._labels = [int(label) for label in labels]
        self._ids = [int(sample_id) for sample_id in ids]
        self._class_names = class_names
        self._tracker = tracker
        self.predictions: list[tuple[np.ndarray, str, str, float]] = []
        """Newest (image [H, W, 3] uint8, true name, predicted name, probability) of each image."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict and log; other ranks go on."""
        if trainer.sanity_checking or not trainer.is_global_zero or not len(self._images):
            return
        probabilities, predicted = self._predict(trainer, pl_module)
        names = self._class_names
        self.predictions = [
            (image.permute(1, 2, 0).numpy(), names[label], names[int(guess)], probability)
            for image, label, guess, probability in zip(
                self._images, self._labels, predicted, probabilities, strict=True
            )
        ]
        if self._tracker is not None:
            captions = [
                f"pred: {guess} {probability:.2f} | true: {true} | #{sample_id}"
                for (_, true, guess, probability), sample_id in zip(
                    self.predictions, self._ids, strict=True
                )
            ]
            pictures = [prediction[0] for prediction in self.predictions]
            self._tracker.log_images("val/predictions", pictures, captions, trainer.global_step)

    def _predict(self, trainer: Trainer, module: LightningModule) -> tuple[list[float], list[int]]:
        """Probability [K] and class index [K] of each image's likeliest class."""
        modes = {part: part.training for part in module.modules()}
        module.eval()
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.forward_context(),
        ):
            parts = [
                module(part.to(module.device)).float().softmax(dim=1).max(dim=1)
                for part in self._images.split(_IMAGES_AT_ONCE)
            ]
        for part, was_training in modes.items():
            part.training = was_training
        best = torch.stack(
            [torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]).float()]
        ).tolist()
        return best[0], [int(index) for index in best[1]]
