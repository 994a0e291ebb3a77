"""BatchNorm statistics that are computed anew before they are used."""

from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightship.data.batch import NOT_COUNTED
from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.models.classifier import ImageClassifier
from lightship.models.finetune import batch_norms
from lightship.models.head import evaluation_mode
from lightship.training.callbacks.ema import EMA
from lightship.training.sync_batch_norm import without_sync

SAMPLES = 1024
_BATCH = 64


class PreciseBatchNorm(Callback):
    """Computes BatchNorm's statistics anew before each validation, and each epoch's end without.

    Of 1,024 training images without augmentation, spread evenly over the set, in batches of up to
    64 that are the same for any number of ranks, which take turns: the mean of the batches' means,
    and the variance around it (Wu and Johnson 2021, arXiv 2105.07576). With an average of the
    weights (EMA), of that. Layers that are frozen keep theirs. A function of the weights alone, so
    a resumed run does the same.

    Goes after EMA and Freezing.

    Args:
        ema: The run's average, if there is one.
    """

    def __init__(self, ema: EMA | None) -> None:
        self.ema = ema
        self._layers: list[_BatchNorm] = []
        self._done_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Same as at the start of an epoch, which a resume within an epoch skips."""
        self._done_step = -1
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which layers train."""
        layers = batch_norms(cast(ImageClassifier, pl_module).net)
        self._layers = [layer for layer in layers if layer.training]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute; within a fit the module holds the average."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._compute(trainer, cast(ImageClassifier, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compute for the checkpoint of the last step, after which there may be no validation."""
        if trainer.global_step == trainer.max_steps:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, unless a validation just did."""
        if self._done_step == trainer.global_step:
            return
        if self.ema is not None:
            self.ema.on_validation_start(trainer, pl_module)
        self._compute(trainer, cast(ImageClassifier, pl_module))
        if self.ema is not None:
            self.ema.on_validation_end(trainer, pl_module)

    def _compute(self, trainer: Trainer, model: ImageClassifier) -> None:
        """Every rank; blocks."""
        self._done_step = trainer.global_step
        if not self._layers:
            return
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        batches = _batches(data.prepare("train").spread(SAMPLES), trainer.world_size)
        loader = data.listed_dataloader("train", batches[trainer.global_rank :: trainer.world_size])
        kept = [
            (layer.momentum, cast(Tensor, layer.num_batches_tracked).clone())
            for layer in self._layers
        ]
        in_precision = trainer.precision_plugin.forward_context()
        with evaluation_mode(model.net), without_sync(model.net), in_precision:
            for layer in self._layers:
                layer.train()
                layer.momentum = 1.0  # the running statistics are those of the batch
            sums = self._sums(model, loader)
            for layer, (momentum, tracked) in zip(self._layers, kept, strict=True):
                layer.momentum = momentum
                cast(Tensor, layer.num_batches_tracked).copy_(tracked)
        count, *totals = comm.sum_float64([torch.tensor([sums[0]]), *sums[1:]])
        if not count:
            return  # no batch has two images that can be read: the running average stays
        for layer, total in zip(self._layers, totals, strict=True):
            mean, square = total / count
            layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            layer.running_var.copy_(square - mean.square())  # type: ignore[union-attr]

    def _sums(self, model: ImageClassifier, loader: Any) -> tuple[int, *tuple[Tensor, ...]]:
        """(batches, a layer's sums of means and of means of squares, [2, C] float64 on the CPU)."""
        count, sums = 0, [torch.zeros(2, layer.num_features).double() for layer in self._layers]
        for batch in loader:
            is_good = batch.labels != NOT_COUNTED
            if int(is_good.sum()) < 2:
                continue
            model.net(model.normalized(batch.images[is_good]))
            count += 1
            for total, layer in zip(sums, self._layers, strict=True):
                mean, variance = (
                    cast(Tensor, each).double().cpu()
                    for each in (layer.running_mean, layer.running_var)
                )
                total += torch.stack([mean, variance + mean.square()])
        return count, *sums


def _batches(ids: np.ndarray, world_size: int) -> np.ndarray:
    """Ids in random batches [K, B] whose sizes differ by one at most, padded with NOT_COUNTED.

    The first ones do not depend on `world_size`, of which K is a multiple: the rest is padding.
    """
    # RandomState, because NumPy promises its stream for ever. Unshuffled, a batch has one class.
    shuffled = ids[np.random.RandomState(0).permutation(len(ids))]
    parts = np.array_split(shuffled, -(-len(ids) // _BATCH))
    count = -(-len(parts) // world_size) * world_size
    batches = np.full((count, len(parts[0])), NOT_COUNTED, dtype=np.int64)
    for batch, part in zip(batches, parts, strict=False):
        batch[: len(part)] = part
    return batches
