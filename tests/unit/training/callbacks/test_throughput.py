"""The log points: where they fall, what they say, and that nothing is fetched between them."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from lightship.training.callbacks.throughput import Throughput
from tests.support.little_fit import classifier, fit


class Recorder(Logger):
    """Keeps what loggers are given."""

    name, version = "recorder", ""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        if "lr" in metrics:
            self.logged.append((step, dict(metrics)))


class Clock(Callback):
    """The time that Throughput reads: it passes only where a test says so."""

    def __init__(self, monkeypatch, step_s=0.0, val_batch_s=0.0, data_s=0.0):
        self.now_s, self.data_s = 0.0, data_s
        self.step_s, self.val_batch_s = step_s, val_batch_s
        monkeypatch.setattr(
            "lightship.training.callbacks.throughput.perf_counter", lambda: self.now_s
        )

    def wait_for_data(self):
        self.now_s += self.data_s

    def on_before_optimizer_step(self, *args):
        self.now_s += self.step_s

    def on_validation_batch_start(self, *args):
        self.now_s += self.val_batch_s


def counting_classifier():
    model = classifier()
    model.fetches = 0
    take = model.take_train_sums

    def counted():
        model.fetches += 1
        return take()

    model.take_train_sums = counted
    return model


def test_log_points_every_n_steps_and_at_each_epochs_end():
    recorder, model = Recorder(), counting_classifier()
    trainer = fit([Throughput(6, 3)], [recorder], train_batches=4, model=model)
    assert [step for step, _ in recorder.logged] == [3, 4, 6, 8]
    assert model.fetches == 4
    assert [metrics["epoch"] for _, metrics in recorder.logged] == [0, 0, 1, 1]
    held = trainer.callback_metrics
    assert held["train/loss"].device.type == "cpu"
    assert float(held["train/loss"]) == pytest.approx(recorder.logged[-1][1]["train/loss"])
    assert "val/acc" in held


def test_an_epoch_cut_short_is_logged():
    recorder = Recorder()
    fit([Throughput(6, 100)], [recorder], train_batches=4, max_epochs=-1, max_steps=6)
    assert [step for step, _ in recorder.logged] == [4, 6]


def test_accumulated_parts_count_as_one_step(monkeypatch):
    recorder, clock = Recorder(), Clock(monkeypatch, step_s=0.5)
    options = {"train_batches": 8, "max_epochs": 1, "accumulate_grad_batches": 2}
    fit([clock, Throughput(12, 2)], [recorder], **options)
    assert [step for step, _ in recorder.logged] == [2, 4]
    for _, metrics in recorder.logged:
        assert metrics["throughput/step_ms"] == pytest.approx(500)
        assert metrics["throughput/images_per_s"] == pytest.approx(24)


def test_validation_inside_an_epoch_is_not_in_the_times(monkeypatch):
    recorder, clock = Recorder(), Clock(monkeypatch, step_s=1, val_batch_s=1000)
    options = {"train_batches": 4, "max_epochs": 1, "val_check_interval": 1}
    fit([clock, Throughput(6, 4)], [recorder], **options)
    [(_, metrics)] = recorder.logged
    assert metrics["throughput/step_ms"] == pytest.approx(1000)
    assert metrics["throughput/data_wait"] == 0


def test_waiting_for_data_shows_as_its_share(monkeypatch):
    recorder, clock = Recorder(), Clock(monkeypatch, step_s=3, data_s=1)
    options = {"train_batches": 8, "max_epochs": 1}
    fit([clock, Throughput(6, 4)], [recorder], before_each_batch=clock.wait_for_data, **options)
    assert recorder.logged[-1][1]["throughput/data_wait"] == pytest.approx(0.25)
    assert recorder.logged[-1][1]["throughput/step_ms"] == pytest.approx(4000)


def test_between_log_points_no_tensor_is_read(monkeypatch):
    """The callback runs whole batches with every way of reading a tensor shut."""
    throughput, model = Throughput(6, 5), classifier()
    trainer = fit([], [], model=model, max_epochs=1)
    throughput.on_train_start(trainer, model)

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "cpu", "to", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for index in range(4):
        throughput.on_train_batch_start(trainer, model, None, index)
        throughput.on_train_batch_end(trainer, model, None, None, index)
