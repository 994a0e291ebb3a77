"""A training loop without Lightning's overhead; the one module that uses Lightning's private names.

Lightning (2.6) calls some forty hooks a step, each of every callback, the module and the strategy,
inside a profiler's context, whether or not they are overridden: more Python than lightship's own
work in a step. Where nothing needs them, `FastLoop` takes the same steps in the same order with the
same counters, and calls only what is overridden. Otherwise, and after a restart, Lightning's loop
runs.

`supports_fast_loop = True` is a promise: of a module, to override no hook of a training step but
`training_step` (which takes a batch and its index), to optimize automatically and to log nothing
through Lightning there; of a data module, that its one loader yields batches on the device; of a
strategy, to take a step as `SingleDeviceStrategy` or `DDPStrategy` does.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

logger = logging.getLogger(__name__)
_LOOP = "fit_loop.epoch_loop."
SIGNAL_NAMES = ("_signal_connector.register_signal_handlers", f"{_LOOP}_broadcast_sigterm_tensor")
LOOP_NAMES = (
    f"{_LOOP}_batches_that_stepped",
    f"{_LOOP}advance",
    f"{_LOOP}on_run_start",
    f"{_LOOP}restarting",
    f"{_LOOP}max_steps",
    f"{_LOOP}batch_progress.is_last_batch",
    f"{_LOOP}batch_progress.current.ready",
    *(f"{_LOOP}batch_progress.increment_{at}" for at in ("ready", "started", "processed")),
    *(f"{_LOOP}{each}_progress.increment_completed" for each in ("batch", "scheduler")),
    f"{_LOOP}scheduler_progress.increment_ready",
    f"{_LOOP}automatic_optimization.optim_progress.optimizer.step.total.completed",
    f"{_LOOP}automatic_optimization.optim_progress.optimizer.zero_grad.increment_started",
)
"""What is used of a Trainer that its documentation does not promise."""
_STEP_HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
"""Hooks within a step: a callback that overrides one gets Lightning's loop."""


def missing_names(trainer: Trainer, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that this version of Lightning does not have."""
    return [name for name in names if not _has_path(trainer, name)]


def use_fast_loop(trainer: Trainer) -> Trainer:
    """Give the trainer, before its fit, a `FastLoop`; without one it trains the same, slower."""
    if missing := missing_names(trainer, LOOP_NAMES):
        logger.debug(f"using Lightning's training loop: Trainer has no {', '.join(missing)}")
    else:
        FastLoop(trainer)
    return trainer


def ignore_signals(trainer: Trainer) -> Trainer:
    """Keep Lightning from handling signals, which `distributed.signals` does.

    Its handler and, in each step, its loop broadcast to the other ranks and wait for the device.
    """
    if missing := missing_names(trainer, SIGNAL_NAMES):
        logger.debug(f"Lightning handles SIGTERM too: Trainer has no {', '.join(missing)}")
    else:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


class FastLoop:
    """Replaces `advance` of Lightning's loop over an epoch: all steps up to the next event.

    An event is what Lightning looks for after each step: the epoch's end, the last step, a request
    to stop. The state stays in Lightning's loop, so checkpoints of both are the same.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        loop = self._trainer.fit_loop.epoch_loop
        self._loop, self._on_run_start, self._advance = loop, loop.on_run_start, loop.advance
        self._steps: _Steps | None = None
        loop.on_run_start, loop.advance = self.on_run_start, self.advance

    def on_run_start(self, data_fetcher: Any) -> None:
        """Decide whether this epoch's steps are fast."""
        self._on_run_start(data_fetcher)
        is_fast = data_fetcher.length is not None and _is_supported(self._trainer)
        self._steps = _Steps(self._trainer, data_fetcher) if is_fast else None

    def advance(self, data_fetcher: Any) -> None:
        """Take steps up to the next event; the first after a restart is Lightning's."""
        if self._steps is None or self._loop.restarting:
            self._advance(data_fetcher)
        else:
            self._steps.take()


def _is_supported(trainer: Any) -> bool:
    data, precision = getattr(trainer, "datamodule", None), trainer.precision_plugin
    return (
        getattr(trainer.lightning_module, "supports_fast_loop", False)
        and getattr(data, "supports_fast_loop", False)
        and _is_plain(trainer.strategy)
        and type(precision) in (Precision, MixedPrecision, HalfPrecision)
        and getattr(precision, "scaler", None) is None
        and isinstance(trainer.profiler, PassThroughProfiler)
        and len(trainer.optimizers) == 1
        and all(
            each.interval == "step" and each.frequency == 1 and not each.reduce_on_plateau
            for each in trainer.lr_scheduler_configs
        )
        and not any(_overrides(each, name) for each in trainer.callbacks for name in _STEP_HOOKS)
        and trainer.val_check_batch in (trainer.num_training_batches, float("inf"))
        and trainer.check_val_every_n_epoch is not None
        and not trainer.fast_dev_run
    )


def _is_plain(strategy: Any) -> bool:
    """Whether no subclass adds to a step, as XLA's do."""
    is_promised = getattr(strategy, "supports_fast_loop", False)
    return is_promised or type(strategy) in (SingleDeviceStrategy, DDPStrategy)


def _overrides(callback: Callback, name: str) -> bool:
    return getattr(type(callback), name) is not getattr(Callback, name)


def _has_path(trainer: Trainer, name: str) -> bool:
    try:
        attrgetter(name)(trainer)
    except AttributeError:
        return False
    return True


class _Steps:
    """The steps of one epoch, with all that stays the same in it looked up once."""

    def __init__(self, trainer: Any, data_fetcher: Any) -> None:
        self.trainer, self.fetcher, self.loop = trainer, data_fetcher, trainer.fit_loop.epoch_loop
        self.module, self.optimizer = trainer.lightning_module, trainer.optimizers[0]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        self.last_batch = trainer.num_training_batches
        # Of DDP alone: keeps a backward pass from averaging gradients.
        self.no_sync = getattr(trainer.strategy, "block_backward_sync", nullcontext)
        self.parts = trainer.accumulate_grad_batches
        self.before = self._hooks("on_train_batch_start")
        self.after = self._hooks("on_train_batch_end")
        precision = trainer.precision_plugin
        plain = type(precision).convert_input is FabricPrecision.convert_input
        self.convert: Callable[[Any], Any] | None = None if plain else precision.convert_input
        # A strategy that wraps the module has a step of its own, which enters the context.
        is_wrapped = trainer.strategy.model is not self.module
        self.context: Callable[[], AbstractContextManager] = (
            nullcontext if is_wrapped or type(precision) is Precision else precision.forward_context
        )
        owner = trainer.strategy if is_wrapped else self.module
        self.training_step: Callable[[Any, int], Tensor] = owner.training_step

    def _hooks(self, name: str) -> list[Callable[..., None]]:
        return [getattr(each, name) for each in self.trainer.callbacks if _overrides(each, name)]

    def take(self) -> None:
        """Steps up to the next event, after which Lightning's loop looks around."""
        loop, trainer = self.loop, self.trainer
        batches = loop.batch_progress
        steps = loop.automatic_optimization.optim_progress.optimizer.step.total
        while True:
            accumulates = self._take_one()
            if (
                batches.is_last_batch
                or trainer.should_stop
                or batches.current.ready == self.last_batch
                or steps.completed == loop.max_steps
            ):
                return
            if not accumulates:
                loop._batches_that_stepped += 1

    def _take_one(self) -> bool:
        """Train on one batch; returns whether its gradients were only accumulated."""
        trainer, module = self.trainer, self.module
        progress = self.loop.batch_progress
        index = progress.current.ready
        batch, _, _ = next(self.fetcher)
        progress.is_last_batch = self.fetcher.done
        if self.convert is not None:
            batch = self.convert(batch)

        progress.increment_ready()
        for hook in self.before:
            hook(trainer, module, batch, index)
        progress.increment_started()
        is_last = progress.is_last_batch or index + 1 == self.last_batch
        accumulates = (index + 1) % self.parts != 0 and not is_last
        if accumulates:
            with self.no_sync():
                loss = self._gradients(batch, index)
        else:
            loss = self._step(batch, index)
        progress.increment_processed()

        if not accumulates:
            scheduled = self.loop.scheduler_progress
            for scheduler in self.schedulers:
                scheduled.increment_ready()
                scheduler.step()
                scheduled.increment_completed()
        outputs = {"loss": loss}
        for hook in self.after:
            hook(trainer, module, outputs, batch, index)
        progress.increment_completed()
        return accumulates

    def _step(self, batch: Any, index: int) -> Tensor:
        """Gradients, and the optimizer's step."""
        counted = self.loop.automatic_optimization.optim_progress.optimizer.step
        counted.increment_ready()
        loss = self._gradients(batch, index)
        trainer = self.trainer
        if trainer.gradient_clip_val:
            self.module.configure_gradient_clipping(
                self.optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
        self.optimizer.step()
        counted.increment_completed()
        return loss

    def _gradients(self, batch: Any, index: int) -> Tensor:
        """The batch's gradients, added to what earlier parts of the same step have left."""
        with self.context():
            loss = self.training_step(batch, index)
        if self.parts > 1:
            loss = loss / self.parts
        if index % self.parts == 0:
            zeroed = self.loop.automatic_optimization.optim_progress.optimizer.zero_grad
            zeroed.increment_ready()
            zeroed.increment_started()
            for parameter in self.parameters:  # zero_grad() also sorts them and starts a profiler
                parameter.grad = None
            zeroed.increment_completed()
        loss.backward()
        return loss.detach()
