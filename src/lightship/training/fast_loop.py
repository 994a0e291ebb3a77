"""A training loop that asks only those who have something to say: Lightning's, without its detours.

Lightning (2.6) goes through some forty hooks a step, each of every callback, the module and the
strategy, under a profiler's context manager, whether or not anything is there: more Python than all
that this project does in a step. Where nothing is asked that needs them, `FastEpochLoop` takes the
same steps in the same order with the same counters, and calls what is overridden and nothing else.
Where more is asked, or at a restart, it does as Lightning does.

A true `supports_fast_loop` is the promise of a module to override no hook of a training step but
`training_step` itself, to optimize automatically and to log nothing through Lightning there; and of
a data module that its batches are on the device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import _MaxSizeCycle
from torch import Tensor

_DETOURS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
"""Hooks within a step: with a callback that has one, steps are Lightning's own."""


def use_fast_loop(trainer: Trainer) -> Trainer:
    """Give the trainer, before its fit, a `FastEpochLoop`."""
    theirs = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = FastEpochLoop(trainer, theirs.min_steps, theirs.max_steps)
    return trainer


class FastEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over an epoch's batches; `advance` takes all steps up to the next event.

    An event is what Lightning looks for after each step: the epoch's end, the last step, a request
    to stop. Its state is Lightning's, so a checkpoint of one is a checkpoint of the other.
    """

    def __init__(self, trainer: Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self._steps: _Steps | None = None

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Find out whether this epoch's steps may be quiet."""
        super().on_run_start(data_fetcher)
        self._steps = _Steps(self, data_fetcher) if _may_be_quiet(self, data_fetcher) else None

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Take steps up to the next event; the first after a restart is Lightning's."""
        if self._steps is None or self.restarting:
            super().advance(data_fetcher)
        else:
            self._steps.take()


def _may_be_quiet(loop: FastEpochLoop, data_fetcher: _DataFetcher) -> bool:
    trainer: Any = loop.trainer
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    strategy, precision = trainer.strategy, trainer.precision_plugin
    return (
        getattr(module, "supports_fast_loop", False)
        and getattr(data, "supports_fast_loop", False)
        and type(strategy) in (SingleDeviceStrategy, DDPStrategy)
        and getattr(strategy, "_model_averager", None) is None
        and type(precision) in (Precision, MixedPrecision, HalfPrecision)
        and getattr(precision, "scaler", None) is None
        and isinstance(trainer.profiler, PassThroughProfiler)
        and len(trainer.optimizers) == 1
        and all(
            each.interval == "step" and each.frequency == 1 and not each.reduce_on_plateau
            for each in trainer.lr_scheduler_configs
        )
        and not any(_has(callback, name) for callback in trainer.callbacks for name in _DETOURS)
        and type(data_fetcher) is _PrefetchDataFetcher
        and data_fetcher.length is not None
        and type(data_fetcher.combined_loader._iterator) is _MaxSizeCycle
        and len(data_fetcher.combined_loader.flattened) == 1
        and trainer._val_check_time_interval is None
        and trainer.val_check_batch in (trainer.num_training_batches, float("inf"))
        and trainer.check_val_every_n_epoch is not None
        and not trainer.fast_dev_run
    )


def _has(callback: Callback, name: str) -> bool:
    return getattr(type(callback), name) is not getattr(Callback, name)


class _Steps:
    """The steps of one epoch, with all that stays the same in it looked up once."""

    def __init__(self, loop: FastEpochLoop, data_fetcher: _DataFetcher) -> None:
        trainer: Any = loop.trainer
        self.loop, self.trainer, self.fetcher = loop, trainer, data_fetcher
        self.module, self.optimizer = trainer.lightning_module, trainer.optimizers[0]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        cycle = data_fetcher.combined_loader._iterator
        assert isinstance(cycle, _MaxSizeCycle)
        assert data_fetcher.length is not None
        self.batches: Iterator[Any] = cycle.iterators[0]
        self.num_batches, self.last_batch = data_fetcher.length, trainer.num_training_batches
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
        return [getattr(each, name) for each in self.trainer.callbacks if _has(each, name)]

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
        """Train on one batch; whether its gradients were added up only."""
        trainer, module, fetcher = self.trainer, self.module, self.fetcher
        progress = self.loop.batch_progress
        index = progress.current.ready
        try:
            batch = next(self.batches)
        except StopIteration:
            fetcher.done = True
            raise
        fetcher.fetched += 1
        progress.is_last_batch = fetcher.done = fetcher.fetched >= self.num_batches
        if self.convert is not None:
            batch = self.convert(batch)

        progress.increment_ready()
        for hook in self.before:
            hook(trainer, module, batch, index)
        progress.increment_started()
        is_last = progress.is_last_batch or index + 1 == self.last_batch
        accumulates = (index + 1) % self.parts != 0 and not is_last
        if accumulates:
            with _block_parallel_sync_behavior(trainer.strategy, block=True):
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
            for parameter in self.parameters:  # zero_grad() also sorts them and tells a profiler
                parameter.grad = None
            zeroed.increment_completed()
        loss.backward()
        return loss.detach()
