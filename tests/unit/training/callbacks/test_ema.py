"""The moving average: its value, where it is used and saved, and that resuming changes nothing."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightship.models.classifier import ImageClassifier
from lightship.training.callbacks.ema import EMA
from tests.unit.models.test_classifier import (
    CLASSES,
    Loader,
    ProfiledSteps,
    batch_of,
    classifier,
    trainer,
)


class WeightsAfterSteps(Callback):
    """The weights after each optimizer step, and what validation and saving saw."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []
        self.saved_in_validation: list[dict] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.steps.append(copy_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == len(self.steps):
            self.steps.append(copy_of(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        self.validated.append(copy_of(pl_module))
        if not trainer.sanity_checking:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self.saved_in_validation.append(copy.deepcopy(checkpoint))


def copy_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def closed_formula(steps: list[dict], key: str, decay: float) -> torch.Tensor:
    """sum of (1 - d_i) w_i prod_{j > i} d_j, and w_0 prod d_j, in float64."""
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(steps) - 1)]
    total = torch.zeros_like(steps[0][key], dtype=torch.float64)
    for index, weights in enumerate(steps):
        share = 1.0 if index == 0 else 1 - decays[index - 1]
        for later in decays[index:]:
            share *= later
        total += share * weights[key].double()
    return total


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


BATCHES = Loader(*map(batch_of, range(8)))
ONE = Loader(batch_of(50))


def with_batch_norm(n: int) -> nn.Module:
    """A net with float and integer buffers, built by name as a user's own."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.0), nn.Linear(784, n)
    )


def batch_norm_classifier() -> ImageClassifier:
    return classifier(net=f"{__name__}:with_batch_norm", optim={"name": "adam", "lr": 1e-2})


@pytest.mark.parametrize("parts", [1, 2])
def test_value_is_the_closed_formula(tmp_path, parts: int) -> None:
    """Whatever the callbacks' order, and once an optimizer step, not once a part."""
    seen, module = WeightsAfterSteps(), batch_norm_classifier()
    runner = trainer(tmp_path, callbacks=[seen, EMA(0.5)], accumulate_grad_batches=parts)
    runner.fit(module, BATCHES)
    assert len(seen.steps) == 1 + 8 // parts
    average = module.state_dict()
    for key, value in average.items():
        if value.is_floating_point():
            expected = closed_formula(seen.steps, key, 0.5)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, seen.steps[-1][key])
        else:
            assert torch.equal(value, seen.steps[-1][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_average_of_weights_in_half_precision_follows_them(dtype: torch.dtype) -> None:
    """A weight and a buffer go from 1 to 2 in 5,000 steps; each is far less than a digit of both.

    With validations, which put the average into the module and take it back.
    """
    module: Any = nn.BatchNorm1d(3).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    runner: Any = SimpleNamespace(optimizers=[optimizer], global_step=0)
    average, steps = EMA(0.999), 5000
    nn.init.ones_(module.weight)
    average.on_fit_start(runner, module)
    expected = 1.0
    for step in range(steps):
        value = 1 + step / steps
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.running_mean, value)
        runner.global_step = step
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        expected += (1 - decay) * (value - expected)
        average.on_validation_start(runner, module)
        average.on_validation_end(runner, module)
    assert module.weight[0].item() == pytest.approx(2, rel=0.01)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    average.on_save_checkpoint(runner, module, checkpoint)
    for name in ("weight", "running_mean"):
        kept = checkpoint["state_dict"][name]
        assert kept.dtype == torch.float32
        assert kept.tolist() == pytest.approx([expected] * 3, rel=1e-3), name
        assert checkpoint["ema_training_weights"][name].dtype == dtype
    average.on_fit_end(runner, module)
    assert module.weight.dtype == dtype
    assert module.weight.tolist() == pytest.approx([expected] * 3, rel=0.01)


@pytest.mark.parametrize("is_older", [True, False])
def test_resuming_in_half_precision(tmp_path, is_older: bool) -> None:
    """Exact; also from a checkpoint of an older version, whose average is bfloat16."""
    path = tmp_path / "middle.ckpt"

    def run(ckpt_path=None) -> tuple[list[dict], ImageClassifier]:
        seen, module = WeightsAfterSteps(), batch_norm_classifier()
        callbacks = [EMA(0.7), SaveAt(8, path), seen]
        runner = trainer(tmp_path, callbacks=callbacks, max_epochs=2, precision="bf16-true")
        runner.fit(module, BATCHES, ckpt_path=ckpt_path)
        return seen.steps, module

    steps, straight = run()
    if is_older:
        checkpoint = torch.load(path, weights_only=True)
        for name, value in checkpoint["ema_training_weights"].items():
            checkpoint["state_dict"][name] = checkpoint["state_dict"][name].to(value.dtype)
        torch.save(checkpoint, path)
    (start,), resumed = run(path)
    assert_same(start, steps[8])
    if not is_older:
        assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    for key, value in straight.state_dict().items():
        assert value.dtype in (torch.bfloat16, torch.int64)
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0.02, atol=0.01)


def test_validation_sees_the_average_and_training_goes_on_without_it(tmp_path) -> None:
    plain, averaged = WeightsAfterSteps(), WeightsAfterSteps()
    for seen, extra in ((plain, []), (averaged, [EMA(0.9)])):
        runner = trainer(tmp_path, callbacks=[*extra, seen], max_epochs=2, val_check_interval=4)
        runner.fit(batch_norm_classifier(), BATCHES, ONE)
    for one, other in zip(plain.steps, averaged.steps, strict=True):
        assert_same(one, other)
    assert len(averaged.validated) == 5  # the sanity check, and twice an epoch
    for validated, step in zip(averaged.validated[1:], (4, 8, 12, 16), strict=True):
        for key, value in validated.items():
            if value.is_floating_point():
                expected = closed_formula(averaged.steps[: step + 1], key, 0.9)
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_the_average_even_made_during_validation(tmp_path) -> None:
    seen = WeightsAfterSteps()
    runner = trainer(tmp_path, callbacks=[seen, EMA(0.9)], val_check_interval=4)
    runner.fit(batch_norm_classifier(), BATCHES, ONE)
    assert len(seen.saved_in_validation) == 2
    for checkpoint, validated, step in zip(
        seen.saved_in_validation, seen.validated[1:], (4, 8), strict=True
    ):
        assert_same(checkpoint["state_dict"], validated)
        assert_same(checkpoint["ema_training_weights"], seen.steps[step])


class SaveAt(Callback):
    def __init__(self, step: int, path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("saver_first", [True, False])
def test_resuming_changes_nothing(tmp_path, saver_first: bool) -> None:
    path = tmp_path / "middle.ckpt"

    def run(ckpt_path=None) -> tuple[dict, dict, ImageClassifier]:
        seen, module = WeightsAfterSteps(), batch_norm_classifier()
        callbacks = [SaveAt(8, path), EMA(0.7)]
        callbacks = callbacks if saver_first else callbacks[::-1]
        runner = trainer(tmp_path, callbacks=[*callbacks, seen], max_epochs=2)
        runner.fit(module, BATCHES, ckpt_path=ckpt_path)
        return seen.steps[0], seen.steps, module

    _, steps, straight = run()
    start, _, resumed = run(path)
    assert_same(start, steps[8])  # training weights, not the average
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))

    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True, trust=True)
    key = "net.4.weight"
    expected = closed_formula(steps[:9], key, 0.7)
    torch.testing.assert_close(loaded.state_dict()[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_test_uses_the_average(tmp_path) -> None:
    module = batch_norm_classifier()
    path = tmp_path / "middle.ckpt"
    runner = trainer(tmp_path, callbacks=[EMA(0.9), SaveAt(5, path)])
    runner.fit(module, BATCHES)
    average = copy_of(module)
    (after_fit,) = runner.test(module, BATCHES, verbose=False)
    assert_same(copy_of(module), average)
    (of_checkpoint,) = runner.test(
        module, BATCHES, verbose=False, ckpt_path=path, weights_only=True
    )
    fresh = ImageClassifier.load_from_checkpoint(path, weights_only=True, trust=True)
    (of_fresh,) = trainer(tmp_path).test(fresh, BATCHES, verbose=False)
    assert of_checkpoint == of_fresh
    assert of_checkpoint["test/loss"] != after_fit["test/loss"]


def test_a_fit_after_a_failed_one_starts_anew(tmp_path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            raise RuntimeError("stopped on purpose")

    average, module = EMA(0.9), batch_norm_classifier()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, callbacks=[average, Fail()]).fit(module, BATCHES)
    seen = WeightsAfterSteps()
    trainer(tmp_path, callbacks=[average, seen]).fit(module, BATCHES)
    expected = closed_formula(seen.steps, "net.4.weight", 0.9)
    torch.testing.assert_close(
        module.state_dict()["net.4.weight"].double(), expected, rtol=1e-5, atol=1e-6
    )


def test_a_step_with_the_average_is_quiet(tmp_path) -> None:
    steps = ProfiledSteps(1, 6)
    runner = trainer(tmp_path, callbacks=[EMA(0.9), steps])
    runner.fit(classifier(), BATCHES)
    counts = {event.key: event.count for event in steps.profiler.key_averages()}
    assert counts["aten::_foreach_lerp_"] == 5  # one for all weights, each step
    assert counts.get("aten::_local_scalar_dense", 0) == 0


def test_class_names_are_still_there(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    trainer(tmp_path, callbacks=[EMA(0.9), SaveAt(3, path)]).fit(classifier(), BATCHES)
    assert torch.load(path, weights_only=True)["class_names"] == CLASSES
