"""The LightningModule: any net as an image classifier, from batches to losses and metrics."""

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightship import versions
from lightship.checkpoint.loading import MODEL_KEYS, load_ckpt_path
from lightship.config import OptimConfig
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.images.resize import Resize
from lightship.errors import ConfigError, DataError
from lightship.models.finetune import (
    freeze_statistics,
    frozen_parameters,
    rates_line,
    set_frozen,
)
from lightship.models.head import Head
from lightship.models.hyper_parameters import check_fits, complete, from_checkpoint
from lightship.models.losses import TrainingLoss
from lightship.models.metrics import LOGGED, EvalMetrics
from lightship.models.nets.build import build_net
from lightship.models.nets.weights import Weights, load_weights
from lightship.models.optim import decay
from lightship.models.optim.build import SGDPart, build_optimizer, build_schedule
from lightship.models.outcomes import Outcomes
from lightship.models.train_sums import TrainSums
from lightship.storage import cache_path

# EvalMetrics has already reduced over the ranks; averaging equal values again would round them.
warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(val|test)/")

_IMAGES_AT_ONCE = 64
_SCHEDULE_FIELDS = ("schedule", "warmup_fraction", "final_lr_fraction")
_SGD_FIELDS = {
    "sgd_lr": "lr",
    "head_lr": "head_lr",
    "sgd_momentum": "momentum",
    "whitening_fraction": "early_fraction",
}


class ImageClassifier(LightningModule):
    """A net, its loss, its optimizer and its metrics.

    All arguments are plain values, so `load_from_checkpoint(path, weights_only=True)` rebuilds the
    model.

    Args:
        net: Name of the net (see build_net).
        class_names: C names in label order.
        image_size_px: Side of the square images.
        interpolation: How they were resized, as `eval_crop` (see `resize.Resize`). Kept for readers
            of the checkpoint.
        eval_crop: Likewise.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
        label_smoothing: See `TrainingLoss`, as `loss`, `focal_gamma` and `class_weights`. They
            change the training loss only: losses of evaluation are plain cross-entropy.
        channels_last: NHWC memory format of images and filters.
        test_flip: Test-time augmentation: average the probabilities with the mirrored image's.
        test_shift: Test-time augmentation: two diagonal shifts by 1 px, together of weight 1/2.
        optim: Arguments of build_optimizer and build_schedule.
        freeze: Which layers do not train (see `finetune.frozen_parameters`).
        unfreeze_epoch: Epoch at whose start they begin to; None: never.
        batch_norm: `frozen`: BatchNorm keeps its running statistics in training.
        dropout: See build_net.
        drop_path: See build_net.
        loss: See `label_smoothing`.
        focal_gamma: Likewise.
        class_weights: Likewise, [C].

    Attributes:
        head: The net's last layer, for batches of features; set by who makes such batches.
        eval_metrics: After a test, or a validation outside a fit, all of EvalMetrics.compute as
            CPU tensors.

    Raises:
        ConfigError: See build_net.
    """

    supports_fast_loop = True  # a promise: see training/fast_loop.py

    def __init__(
        self,
        net: str,
        class_names: list[str],
        image_size_px: int,
        mean: list[float],
        std: list[float],
        interpolation: str = "bilinear",
        eval_crop: float = 1.0,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        test_flip: bool = False,
        test_shift: bool = False,
        optim: dict[str, Any] | None = None,
        freeze: str = "none",
        unfreeze_epoch: int | None = None,
        batch_norm: str = "train",
        dropout: float | None = None,
        drop_path: float | None = None,
        loss: str = "cross_entropy",
        focal_gamma: float = 2.0,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.class_names = class_names
        self.training_loss = TrainingLoss(loss, focal_gamma, label_smoothing, class_weights)
        self.test_flip, self.test_shift = test_flip, test_shift
        self.optim = dict(optim or {})
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = build_net(net, len(class_names), image_size_px, dropout, drop_path)
        self.net.to(memory_format=self.memory_format)
        self.frozen = frozen_parameters(self.net, net, freeze)
        self.unfreeze_epoch = unfreeze_epoch
        self.keeps_statistics = batch_norm == "frozen"
        if unfreeze_epoch is None:  # they need no state of an optimizer
            set_frozen(self.net, self.frozen, True)
        # (x / 255 - mean) / std as one multiply-add. No buffers: DDP would broadcast them each
        # step, and a half-precision run would round them.
        deviation = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1) / deviation
        self.head: Head | None = None
        self.evaluation = EvalMetrics(len(class_names), with_confusion=True)
        self.eval_metrics: dict[str, Tensor] = {}
        self.outcomes = Outcomes()
        self._keeps_outcomes = False
        self._decay_version = decay.NEWEST
        self._train_sums = TrainSums()
        self._has_peers = False
        # Searching takes as long as a layer, so once. In a tuple, so that it is not a submodule.
        self._first_weight = next(
            (owner, name)
            for owner in self.net.modules()
            for name, weight in owner._parameters.items()
            if weight is not None and weight.is_floating_point()
        )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Mapping[str, Any], named_net: str = "", trust: bool = False
    ) -> "ImageClassifier":
        """The model of a checkpoint's content, on the CPU.

        Args:
            checkpoint: With MODEL_KEYS, as `checkpoint.loading` reads it.
            named_net: The net that the user named. Another import path in the checkpoint is not
                called.
            trust: Whether it is called all the same.

        Raises:
            ConfigError: The net is code that the user did not name; or hyper-parameters or weights
                do not match this version or the net's code.
        """
        model = cls(**from_checkpoint(cls, checkpoint, named_net, trust))
        check_fits(model.state_dict(), checkpoint["state_dict"])
        model.load_state_dict(checkpoint["state_dict"])
        return model

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        weights_only: bool = True,
        net: str = "",
        trust: bool = False,
    ) -> "ImageClassifier":
        """The model of a checkpoint's file, by Lightning's name. See `from_checkpoint` for errors.

        Args:
            checkpoint_path: Path or URL of the file.
            map_location: Device of the model.
            weights_only: Must be true: no code in the file is run.
            net: The net, if it is an import path.
            trust: Whether an import path in the file is called that `net` does not name.
        """
        if not weights_only:
            raise ConfigError("weights_only is False: lightship runs no code in a checkpoint")
        checkpoint = load_ckpt_path(str(checkpoint_path), MODEL_KEYS)
        model = cls.from_checkpoint(checkpoint, net, trust)
        return model if map_location is None else model.to(map_location)

    def load_weights(self, weights: Weights) -> None:
        """Start from weights (see `weights.load_weights`). Fresh starts only, every rank."""
        load_weights(self.net, self.hparams["net"], weights, self.class_names)

    @property
    def resize(self) -> Resize:
        """How images become the squares that it takes."""
        return Resize(self.hparams["interpolation"], self.hparams["eval_crop"])

    def freeze_for(self, epoch: int) -> bool:
        """Freeze or unfreeze layers as an epoch of a fit asks; whether that is a change."""
        is_frozen = self.unfreeze_epoch is None or epoch < self.unfreeze_epoch
        is_change = set_frozen(self.net, self.frozen, is_frozen)
        if self.keeps_statistics:
            freeze_statistics(self.net)
        return is_change

    def freeze_for_good(self) -> None:
        """Freeze what never trains, as at the end of a fit."""
        self.freeze_for(self.unfreeze_epoch or 0)

    @property
    def rates_line(self) -> str:
        """See `finetune.rates_line`."""
        lr, decay, head = (
            float(self.optim.get(name, getattr(OptimConfig, name)))
            for name in ("lr", "layer_decay", "head_lr_scale")
        )
        return rates_line(self.net, lr, decay, head, self.frozen, self.unfreeze_epoch)

    def compile_net(self, mode: str) -> None:
        """Compile the net in place with a torch.compile mode; state_dict keys stay as they are."""
        # Torch's default lies in /tmp, where another user may have put code before.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_path("inductor")))
        self.net.compile(mode=mode)

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Call the net's `init_from_images`, if it has one. Fresh starts only.

        Args:
            images: [N, 3, S, S] uint8, the same on every rank.

        Raises:
            DataError: The net needs images, and there are none.
        """
        if self.wants_images:
            if not len(images):
                raise DataError("no image that the net can start from can be read (--data.root)")
            normalised = torch.addcmul(self._shift, images.float(), self._scale)
            self.net.init_from_images(normalised)  # type: ignore[operator]

    @property
    def wants_images(self) -> bool:
        """Whether the net has a method `init_from_images`."""
        return hasattr(self.net, "init_from_images")

    def setup(self, stage: str) -> None:
        """Let the metrics sum over the ranks with the strategy's reduce."""
        self._train_sums.restart()  # of an earlier fit
        self.outcomes, self._keeps_outcomes = Outcomes(), stage != "fit"
        self._has_peers = self.trainer.world_size > 1
        self.evaluation.sum_over_ranks = self._sum_over_ranks if self._has_peers else None

    def on_train_start(self) -> None:
        """Same as at the start of an epoch, which a resume within an epoch skips."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Freeze the bias of a whitening layer when its learning rate stays 0.

        A function of the epoch alone, so that a resumed run does the same.
        """
        if not hasattr(self.net, "trains_whitening"):
            return
        trainer = self.trainer
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        ends = [g["ends_at"] for g in self.optimizers().param_groups if "ends_at" in g]  # type: ignore[union-attr]
        last = max(ends, default=1.0) * trainer.estimated_stepping_batches
        self.net.trains_whitening = steps * trainer.current_epoch < last  # type: ignore[assignment]

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="sum"))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: [B, 3, S, S] uint8 or floating point, RGB in 0..255; or what `head` gets for
                them, [B, D] (`Head.features`).

        Returns:
            Logits [B, C] in the net's (or autocast's) dtype.
        """
        if images.ndim == 2:
            assert self.head is not None
            return self.head.logits(images)
        return self.net(self.normalized(images))

    def normalized(self, images: Tensor) -> Tensor:
        """Images as `forward` takes them, as the net does: [B, 3, S, S] in its dtype."""
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        pixels = images.to(torch.float32, memory_format=self.memory_format)
        normalised = torch.addcmul(self._shift, pixels, self._scale)
        owner, name = self._first_weight
        return normalised.to(getattr(owner, name).dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch: the sum over counted rows, divided by B (all rows).

        So the mean over ranks and parts is that of the global batch, wherever skipped rows are.
        """
        logits = self(batch.images).float()
        if batch.mixed_labels is None:
            total = self.training_loss(logits, batch.labels, "sum")
        else:
            assert batch.mix_weight is not None
            losses, mixed_losses = (
                self.training_loss(logits, labels, "none")
                for labels in (batch.labels, batch.mixed_labels)
            )
            counted = batch.labels != NOT_COUNTED
            total = (torch.lerp(mixed_losses, losses, batch.mix_weight.float()) * counted).sum()
        self._train_sums.add(total, logits, batch)
        return total / len(batch.labels)

    def take_train_sums(self) -> dict[str, float]:
        """Mean training loss and accuracy over all ranks since the last call; resets the sums.

        Every rank at the same step; blocks. The only place in training that synchronizes with the
        device and the other ranks, so at log points only. With mixup and CutMix, a hit counts as
        the weight of the label that was predicted.

        Returns:
            train/loss and train/acc; NaN if every row was skipped, empty if there was no step.
        """
        sums = self._train_sums.value()
        if sums is None:
            return {}
        self._train_sums.restart()
        loss_sum, hits, count = (self._sum_over_ranks(sums) if self._has_peers else sums).tolist()
        nan = float("nan")
        return {
            "train/loss": loss_sum / count if count else nan,
            "train/acc": hits / count if count else nan,
        }

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Log-probabilities [B, C] float32.

        With test_flip and test_shift, the log of the views' mean probabilities. Unlike a mean of
        logits this is a distribution, so its cross-entropy is a loss. The views and weights are
        airbench's (https://github.com/KellerJordan/cifar10-airbench).
        """
        if not self.test_shift:
            return self._log_probabilities_both_ways(images)
        corners = [_moved(images, pixels) for pixels in (-1, 1)]
        shifted = torch.logaddexp(*map(self._log_probabilities_both_ways, corners)) - math.log(2)
        return torch.logaddexp(self._log_probabilities_both_ways(images), shifted) - math.log(2)

    def _log_probabilities_both_ways(self, images: Tensor) -> Tensor:
        scores = self(images).float().log_softmax(1)
        if not self.test_flip:
            return scores
        mirrored = self(images.flip(3)).float().log_softmax(1)
        return torch.logaddexp(scores, mirrored) - math.log(2)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities [N, C] float32 on the CPU, for use outside the trainer. Blocks.

        In evaluation mode, in batches of at most 64, and eager, since a compiled net would be
        recompiled for these devices and shapes. Restores the modules' modes.

        Args:
            images: [N, 3, S, S] uint8 RGB, on any device.
        """
        modes = {part: part.training for part in self.modules()}
        self.eval()
        with torch.compiler.set_stance("force_eager"):
            parts = [
                self.log_probabilities(part.to(self.device)).exp().cpu()
                for part in images.split(_IMAGES_AT_ONCE)
            ]
        for part, was_training in modes.items():
            part.training = was_training
        return torch.cat(parts)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a validation batch."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a test batch."""
        self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        scores = self.log_probabilities(batch.images)
        self.evaluation.update(scores, batch.labels)
        if self._keeps_outcomes:
            self.outcomes.add(batch, scores)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/acc, val/balanced_acc, val/f1 and (if C > 5) val/top5, of all ranks."""
        self._log_evaluation("val", *LOGGED)

    def on_test_epoch_end(self) -> None:
        """Log the same of the test split, and test/num_samples."""
        self._log_evaluation("test", *LOGGED, "num_samples")

    def _log_evaluation(self, split: str, *names: str) -> None:
        results = self.evaluation.compute()
        self.evaluation.reset()
        if self.trainer.state.fn != TrainerFn.FITTING:
            results = self.eval_metrics = {name: value.cpu() for name, value in results.items()}
        self.log_dict({f"{split}/{name}": results[name] for name in names if name in results})

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Each row's id (NOT_COUNTED in padding), [B], and its probabilities, [B, C] float32."""
        return batch.ids, self.log_probabilities(batch.images).exp()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and its schedule over all steps of the trainer."""
        schedule = {key: self.optim[key] for key in _SCHEDULE_FIELDS if key in self.optim}
        settings = {key: value for key, value in self.optim.items() if key not in schedule}
        rest = {name: settings.pop(key) for key, name in _SGD_FIELDS.items() if key in settings}
        # A fused optimizer unscales fp16 gradients internally, too late for clipping.
        fused = not (self.trainer.precision == "16-mixed" and self.trainer.gradient_clip_val)
        optimizer = build_optimizer(
            self.net, **settings, fused=fused, rest=SGDPart(**rest), late=self.frozen,
            decay_version=self._decay_version,
        )  # fmt: skip
        scheduler = build_schedule(optimizer, self.trainer.estimated_stepping_batches, **schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients' norm; of a fused optimizer in bf16-mixed too, which unscales nothing.

        Lightning refuses that, as in fp16.
        """
        if self.trainer.precision == "bf16-mixed" and gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the class names, for readers without this class, and what a restart goes on with.

        That are the open training sums and the version of the weight decay.

        Every rank: the sums are those of all ranks.
        """
        checkpoint["class_names"] = self.class_names
        sums = self._train_sums.value()
        if sums is not None and self._has_peers:
            sums = self._sum_over_ranks(sums.clone())
        checkpoint["train_sums"] = sums
        checkpoint["decay"] = self._decay_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; restore its training sums, on rank 0 for all ranks.

        Before the optimizer is made, whose groups are those of the run's version.

        Raises:
            ConfigError: Its hyper-parameters differ.
            NewerVersion: Its weight decay is that of a newer version.
        """
        kept = complete(type(self), checkpoint["hyper_parameters"])
        changed = [
            f"{name} was {kept[name]!r}, is {value!r}"
            for name, value in complete(type(self), self.hparams).items()
            if kept[name] != value
        ]
        if changed:
            raise ConfigError(
                f"the checkpoint is of another model or data set: {'; '.join(changed)[:500]}. To "
                "start from its weights alone give it as --model.weights"
            )
        check_fits(self.state_dict(), checkpoint["state_dict"])
        self._decay_version = checkpoint.get("decay", decay.FIRST)
        versions.check("decay", self._decay_version, "the checkpoint")
        if self.global_rank == 0:
            sums = checkpoint.get("train_sums")
            if sums is not None and (not isinstance(sums, Tensor) or sums.shape != (3,)):
                raise ConfigError("the checkpoint's train_sums are not three numbers")
            self._train_sums.restart(sums)


def _moved(images: Tensor, pixels: int) -> Tensor:
    """Images [B, 3, S, S] moved down and right by `pixels` (-1: up and left), reflected there."""
    index = torch.arange(images.shape[3], device=images.device) - pixels
    last = images.shape[3] - 1
    index = last - (last - index.abs()).abs()
    return images.index_select(2, index).index_select(3, index)
