"""Exponential moving average (EMA) of the weights, used for evaluation and checkpoints."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightship.models.hyper_parameters import check_fits

_TRAINING_WEIGHTS = "ema_training_weights"


class EMA(Callback):
    """Average all floating-point weights and buffers after each optimizer step of a fit.

    The decay rises as min(decay, (1 + n) / (10 + n)) with n the steps done before, so that early
    averages are not mostly the initial weights (`num_updates` of TensorFlow's
    ExponentialMovingAverage); it depends on the step alone, so resuming needs no other state.
    Integer buffers are not averaged. Averages of bfloat16 and float16 are float32: in their own
    precision an update is less than half of the last digit, and lost.

    Within a fit, validation uses the average. A checkpoint's `state_dict` is the average; the
    training weights are saved beside it and restored on resume. After the fit the module holds the
    average: save the last checkpoint before that (on_train_end at the latest).

    Differences from Lightning's EMAWeightAveraging: the average is on the training device from the
    start, one multi-tensor operation updates it, it is updated right after the optimizer (so a
    checkpoint saved by any callback at the end of a batch is complete), and a checkpoint saved
    during validation is correct too.

    Args:
        decay: Of the average, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] | None = None
        self._training: dict[str, Tensor] | None = None  # while the module holds the average
        self._by_dtype: list[tuple[list[Tensor], list[Tensor]]] = []
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset what a failed fit has left."""
        if self._hook is not None:
            self._hook.remove()
        self._average, self._training, self._by_dtype, self._hook = None, None, [], None

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights on the device, or from a checkpoint's average."""
        current = _floating(pl_module)
        loaded = self._average or current
        # A new tensor in the weight's own memory format: the fast multi-tensor path needs it.
        self._average = {
            name: _empty_average(weight).copy_(loaded[name]) for name, weight in current.items()
        }
        dtypes = {weight.dtype for weight in current.values()}
        self._by_dtype = [
            (
                [self._average[name] for name, weight in current.items() if weight.dtype == dtype],
                [weight for weight in current.values() if weight.dtype == dtype],
            )
            for dtype in dtypes
        ]

        def after_optimizer_step(*_: Any) -> None:
            self._update(trainer.global_step)

        assert len(trainer.optimizers) == 1
        self._hook = trainer.optimizers[0].register_step_post_hook(after_optimizer_step)

    @torch.no_grad()
    def _update(self, steps_done: int) -> None:
        decay = min(self.decay, (1 + steps_done) / (10 + steps_done))
        for averages, weights in self._by_dtype:
            ends = weights
            if weights[0].dtype != averages[0].dtype:  # lerp takes one type of both
                ends = [torch.empty_like(average) for average in averages]
                torch._foreach_copy_(ends, weights)
            torch._foreach_lerp_(averages, ends, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the average; keep the training weights."""
        if self._average is not None:
            current = _floating(pl_module)
            self._training = {name: weight.detach().clone() for name, weight in current.items()}
            _copy(self._average, current)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the training weights; keep what changed BatchNorm's statistics (precise)."""
        if self._training is not None:
            assert self._average is not None
            current = _floating(pl_module)
            for name, _ in pl_module.named_buffers():
                if name in current:
                    average, held = self._average[name], current[name]
                    # What did not change is a rounding of the average.
                    changed = held != average.to(held.dtype)
                    average.copy_(torch.where(changed, held, average))
            _copy(self._training, current)
            self._training = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average into the module."""
        assert self._average is not None
        assert self._hook is not None
        self._hook.remove()
        _copy(self._average, _floating(pl_module))
        self._average, self._by_dtype, self._hook = None, [], None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the checkpoint's weights, and the training weights beside them."""
        if self._average is not None:
            state = checkpoint["state_dict"]
            checkpoint[_TRAINING_WEIGHTS] = {**state, **(self._training or {})}
            checkpoint["state_dict"] = {**state, **self._average}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On resume, restore the average and the training weights."""
        if trainer.state.fn == TrainerFn.FITTING and _TRAINING_WEIGHTS in checkpoint:
            names = _floating(pl_module)
            self._average = {name: checkpoint["state_dict"][name].clone() for name in names}
            check_fits(pl_module.state_dict(), checkpoint[_TRAINING_WEIGHTS])
            pl_module.load_state_dict(checkpoint[_TRAINING_WEIGHTS])


def _floating(module: LightningModule) -> dict[str, Tensor]:
    """The module's own floating-point parameters and buffers (not copies) by state_dict name."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def _empty_average(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
