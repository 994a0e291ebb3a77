"""The fast loop does what Lightning's does, bit for bit, and steps aside where it cannot."""

import copy
import logging
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer import call

from lightship.data.module import ImageData
from lightship.models.classifier import ImageClassifier
from lightship.training import fast_loop
from lightship.training.callbacks.ema import EMA
from lightship.training.callbacks.seeding import StepSeeding
from lightship.training.fast_loop import FastLoop, ignore_signals, use_fast_loop
from tests.support import little_fit
from tests.support.runs import differences

BATCHES = 7


class Placed:
    """Endless batches whose place is asked for, as the project's own loaders are."""

    def __init__(self, trainer: Trainer, batches: int) -> None:
        self.trainer, self.batches = trainer, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        while True:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            yield little_fit.batch_of(100 * self.trainer.current_epoch + done)


class Data(LightningDataModule):
    supports_fast_loop = True

    def __init__(self, batches: int = BATCHES) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Placed:
        return Placed(self.trainer, self.batches)

    def val_dataloader(self) -> little_fit.ValLoader:
        return little_fit.ValLoader(2)


class Watch(Callback):
    """Notes every event with all the loops' counters, and keeps the checkpoint of one batch."""

    def __init__(self, keep_at: int = -1, stop_at: int = -1) -> None:
        self.seen: list[tuple] = []
        self.keep_at, self.stop_at = keep_at, stop_at
        self.checkpoint: dict[str, Any] = {}

    def _note(self, trainer: Trainer, what: str, *more: Any) -> None:
        loops = copy.deepcopy(trainer.fit_loop.state_dict())
        self.seen.append((what, trainer.global_step, trainer.current_epoch, *more, loops))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._note(trainer, "start", batch_idx, batch.images.float().mean().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self._note(trainer, "end", batch_idx, outputs["loss"].item(), rates)
        if len([s for s in self.seen if s[0] == "end"]) == self.keep_at:
            dumped = trainer._checkpoint_connector.dump_checkpoint()
            self.checkpoint = copy.deepcopy(dumped)
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._note(trainer, "epoch start")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._note(trainer, "epoch end")

    def on_validation_end(self, trainer, pl_module) -> None:
        self._note(trainer, "validated", float(trainer.callback_metrics["val/loss"]))


def fit(
    tmp_path,
    supports_fast_loop: bool,
    watch: Watch,
    more=(),
    ckpt_path=None,
    batches: int = BATCHES,
    **options,
) -> tuple[Trainer, ImageClassifier]:
    model = little_fit.classifier(
        net="tests.support.own_nets:moody",
        optim={"name": "muon", "lr": 0.01, "schedule": "linear", "warmup_fraction": 0.1},
    )
    trainer = Trainer(
        **{"max_epochs": 3, **options},
        accelerator="cpu",
        logger=False,
        callbacks=[StepSeeding(1), watch, *more],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    if supports_fast_loop:
        use_fast_loop(trainer)
    trainer.fit(model, datamodule=Data(batches), ckpt_path=ckpt_path)
    return trainer, model


def took_fast_steps(trainer: Trainer) -> bool:
    loop = getattr(trainer.fit_loop.epoch_loop.advance, "__self__", None)
    return isinstance(loop, FastLoop) and loop._steps is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"fp16": True},
        {"max_steps": 11, "max_epochs": -1},
        {"limit_train_batches": 4, "check_val_every_n_epoch": 2},
        {"watch": {"stop_at": 9}},
        {"ema": True},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "plain",
)
def test_every_event_counter_and_weight_is_lightnings(tmp_path, options) -> None:
    options = dict(options)
    noted, states = [], []
    settings, ema = options.pop("watch", {}), options.pop("ema", False)
    fp16 = options.pop("fp16", False)
    for supports_fast_loop in (False, True):
        watch = Watch(**settings)
        if fp16:  # by its name Lightning makes bf16 of it on a CPU
            options["plugins"] = [MixedPrecision("16-mixed", "cpu")]
        trainer, _ = fit(tmp_path, supports_fast_loop, watch, [EMA(0.9)] if ema else [], **options)
        # fp16's loss scale is Lightning's business.
        assert took_fast_steps(trainer) == (supports_fast_loop and not fp16)
        noted.append(watch.seen)
        states.append(trainer._checkpoint_connector.dump_checkpoint())
    assert len(noted[0]) > 20
    assert not differences(*noted)
    assert not differences(*states)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("at", range(5, 9))
def test_either_goes_on_from_the_others_checkpoint(tmp_path, at: int, parts: int) -> None:
    path = tmp_path / "kept.ckpt"
    found = {}
    for first, then in ((False, False), (False, True), (True, False), (True, True)):
        watch = Watch(keep_at=at)
        fit(tmp_path, first, watch, accumulate_grad_batches=parts)
        torch.save(watch.checkpoint, path)
        resumed = Watch()
        _, model = fit(tmp_path, then, resumed, ckpt_path=path, accumulate_grad_batches=parts)
        found[first, then] = resumed.seen, model.state_dict()
    for seen, weights in found.values():
        assert len(seen) > 20
        assert not differences(found[False, False][0], seen)
        assert not differences(found[False, False][1], weights)


def test_no_hook_is_looked_for_in_a_step(tmp_path, monkeypatch) -> None:
    """What Lightning calls by name does not grow with the number of batches."""
    counts: list[int] = []
    for name in ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook"):
        theirs = getattr(call, name)

        def counted(trainer, hook, *args, _theirs=theirs, **kwargs):
            counts[-1] += 1
            return _theirs(trainer, hook, *args, **kwargs)

        monkeypatch.setattr(call, name, counted)

    def calls(batches: int, supports_fast_loop: bool) -> int:
        counts.append(0)
        fit(tmp_path, supports_fast_loop, Watch(), batches=batches)
        return counts[-1]

    assert calls(12, supports_fast_loop=True) == calls(6, supports_fast_loop=True)
    assert calls(12, supports_fast_loop=False) - calls(6, supports_fast_loop=False) == 3 * 6 * 23


class Meddler(Callback):
    def __init__(self) -> None:
        self.called = 0

    def on_after_backward(self, trainer, pl_module) -> None:
        self.called += 1


def test_a_callback_or_loader_that_needs_more_gets_lightnings_loop(tmp_path) -> None:
    meddler = Meddler()
    trainer, _ = fit(tmp_path, True, Watch(), [meddler])
    assert meddler.called == 3 * BATCHES
    assert not took_fast_steps(trainer)

    # Here the loader is no data module's.
    loud = use_fast_loop(
        Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
    )
    loud.fit(little_fit.classifier(), little_fit.EndlessLoader(3))
    assert not took_fast_steps(loud)


STEP_HOOKS = [
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad"),
    *("backward", "lr_scheduler_step", "configure_gradient_clipping"),
    *("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"),
]


def test_supports_fast_loop_is_true() -> None:
    assert ImageClassifier.supports_fast_loop
    assert ImageData.supports_fast_loop
    for hook in {*STEP_HOOKS} - {"configure_gradient_clipping"}:  # which the fast loop calls
        assert getattr(ImageClassifier, hook) is getattr(LightningModule, hook), hook
    for hook in STEP_HOOKS[-3:-1]:
        assert getattr(ImageData, hook) is getattr(LightningDataModule, hook), hook
    batch = little_fit.batch_of(0)
    data = ImageData.__new__(ImageData)
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    assert set(fast_loop._STEP_HOOKS) <= set(STEP_HOOKS)


@pytest.mark.parametrize("name", [*fast_loop.SIGNAL_NAMES, *fast_loop.LOOP_NAMES])
def test_lightning_has_the_private_name(tmp_path, name: str) -> None:
    """Fails by the name when a version of Lightning no longer has it: the fit is then slower."""
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert not fast_loop.missing_names(trainer, (name,))


def own_lines(caplog) -> list[str]:
    of_module = [record for record in caplog.records if record.name == fast_loop.logger.name]
    assert all(record.levelno == logging.DEBUG for record in of_module)
    return [record.getMessage() for record in of_module]


def test_without_a_private_name_lightnings_loop_trains_the_same(
    tmp_path, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.DEBUG, "lightship")
    _, fast = fit(tmp_path, True, Watch())
    assert not own_lines(caplog)

    use = use_fast_loop

    def adapt(trainer: Trainer) -> None:
        """Lightning needs the name too: it is gone only while it is looked for."""
        loop = trainer.fit_loop.epoch_loop
        value = loop.__dict__.pop("_batches_that_stepped")
        use(trainer)
        loop._batches_that_stepped = value

    monkeypatch.setitem(globals(), "use_fast_loop", adapt)
    trainer, plain = fit(tmp_path, True, Watch())
    assert not took_fast_steps(trainer)
    [line] = own_lines(caplog)
    assert line.startswith("using Lightning's training loop: ")
    assert line.endswith(" fit_loop.epoch_loop._batches_that_stepped")
    assert not differences(fast.state_dict(), plain.state_dict())


def test_lightning_handles_no_signals(tmp_path, monkeypatch, caplog) -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    ignore_signals(trainer)._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None

    caplog.set_level(logging.DEBUG, "lightship")
    monkeypatch.delattr(type(trainer.fit_loop.epoch_loop), "_broadcast_sigterm_tensor")
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    ignore_signals(trainer)
    assert "fit_loop.epoch_loop._broadcast_sigterm_tensor" in caplog.text
