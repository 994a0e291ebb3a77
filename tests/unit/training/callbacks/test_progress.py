"""What is shown of a real small fit: bounded, parseable, whole lines, and no fetch of its own."""

import io
import json
import logging
import re

import pytest
import torch
from lightning.pytorch import Callback

from lightship.console import display as display_module
from lightship.console import log
from lightship.console import screen as screen_module
from lightship.console.display import Bar
from lightship.console.log_format import duration_text
from lightship.console.screen import Screen
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.training.callbacks import progress as progress_module
from lightship.training.callbacks.progress import build_progress
from lightship.training.callbacks.throughput import Throughput
from tests.support.little_fit import evaluate, fit


class Clock(Callback):
    """The time that the display reads: a step takes `step_s` of it."""

    def __init__(self, monkeypatch, step_s):
        self.now_s, self.step_s = 0.0, step_s
        for module in (progress_module, display_module, screen_module):
            monkeypatch.setattr(module, "monotonic", lambda: self.now_s)

    def on_train_batch_start(self, *args):
        self.now_s += self.step_s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_json_lines_parse_and_carry_the_numbers(tmp_path, monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=3)
    shown = build_progress("json", stream=stream)
    table = MetricsCSV(str(tmp_path))
    fit([clock, Throughput(6, 1), shown], [table], train_batches=4, test=True)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("val") == 2
    assert kinds[-2:] == ["end", "test"]
    last_val = [event for event in events if event["event"] == "val"][-1]
    assert (last_val["step"], last_val["max_steps"]) == (8, 8)
    assert (last_val["epoch"], last_val["max_epochs"]) == (2, 2)
    assert last_val["val/acc"] == pytest.approx(table.rows[-1]["val/acc"])
    losses = [row["val/loss"] for row in table.rows if "val/loss" in row]
    assert last_val["monitor"] == "val/loss"
    assert last_val["best"] == pytest.approx(min(losses))
    assert last_val["best_epoch"] == losses.index(min(losses)) + 1
    train = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in train] == [1, 3, 6, 8]
    assert train[1]["left_s"] == pytest.approx(15)
    assert train[1]["train/loss"] == pytest.approx(table.rows[2]["train/loss"], rel=1e-6)
    assert events[-1]["test/acc"] == pytest.approx(table.rows[-1]["test/acc"])
    assert not {"epoch", "step", "left_s"} & events[-1].keys(), "of a trainer that has not trained"


def test_a_number_is_told_once(tmp_path, monkeypatch):
    """A line without newer ones leaves them out: the same loss again would look like a halt."""
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=6)
    table = MetricsCSV(str(tmp_path))
    shown = build_progress("text", stream=stream)
    fit([clock, Throughput(6, 4), shown], [table], train_batches=12, max_epochs=1)
    lines = [line for line in stream.getvalue().splitlines() if " left " in line]
    steps = [int(re.search(r"step +(\d+)/12", line)[1]) for line in lines if "VAL" not in line]
    told = [line for line in lines if " loss " in line and "VAL" not in line]
    assert steps == list(range(1, 13))
    assert len(told) == len({line.partition(" loss ")[2][:6] for line in told}) >= 2


@pytest.mark.parametrize(
    ("monitor", "pick"), [("val/loss", min), ("val/acc", max), ("val/f1", max)]
)
def test_the_best_is_the_monitors(tmp_path, monkeypatch, monitor, pick):
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=3)
    table = MetricsCSV(str(tmp_path))
    shown = build_progress("text", monitor, stream)
    fit([clock, Throughput(6, 1), shown], [table], max_epochs=6)
    best = pick(row[monitor] for row in table.rows if monitor in row)
    [last] = [
        line for line in stream.getvalue().splitlines() if "epoch 6/6" in line and "VAL" in line
    ]
    assert f"best {monitor[4:]} {best:.4f} (epoch " in last
    assert f"  {monitor[4:]} {table.rows[-1][monitor]:.4f}  " in last
    assert "  train loss " in last


def test_a_loss_that_is_no_number_is_still_json(tmp_path, monkeypatch):
    stream = io.StringIO()

    class Broken(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.callback_metrics["train/loss"] = torch.tensor(float("nan"))

    clock = Clock(monkeypatch, step_s=10)
    fit([clock, Broken(), build_progress("json", stream=stream)], max_epochs=1)
    for line in stream.getvalue().splitlines():
        event = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert event.get("train/loss") is None


@pytest.mark.parametrize(
    ("step_s", "epoch_steps", "minutes"), [(0.25, 1, 1), (1, 1, 1), (1, 7, 2), (2.5, 120, 5)]
)
def test_text_lines_of_a_minute_are_few(
    monkeypatch, step_s: float, epoch_steps: int, minutes: int
) -> None:
    """However short an epoch and a step are: under one a second, none of them long."""
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=step_s)
    shown = build_progress("text", stream=stream)
    epochs = int(60 * minutes / step_s / epoch_steps)
    fit([clock, shown], train_batches=epoch_steps, val_batches=1, max_epochs=epochs)
    lines = stream.getvalue().splitlines()
    assert 10 * minutes < len(lines) < 60 * minutes
    assert max(len(line) for line in lines) < 130
    assert f"epoch {epochs}/{epochs}" in lines[-2]
    ended = duration_text(step_s * epochs * epoch_steps)
    assert f"training ended at step {epochs * epoch_steps} after {ended}" in lines[-1]


@pytest.mark.parametrize(
    ("step_s", "epoch_steps", "told_at_step", "text"),
    [
        (2.5, 40, 3, "an epoch (40 steps) takes about 1:40"),
        (1.0, 4, 4, "an epoch (4 steps) takes about 4 s"),
        (0.3, 2, 2, "an epoch (2 steps) takes about 0.6 s"),
    ],
)
def test_the_length_of_an_epoch_is_told_once_when_it_is_known(
    monkeypatch, step_s: float, epoch_steps: int, told_at_step: int, text: str
) -> None:
    """By the steps after the first, which takes a minute here."""
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=step_s)

    class Compiles(Callback):
        def on_train_batch_start(self, trainer, *args):
            clock.now_s += 60 * (trainer.global_step == 0)

    class Counts(Callback):
        told_at = None

        def on_train_batch_end(self, trainer, *args):
            if self.told_at is None and "an epoch (" in stream.getvalue():
                self.told_at = trainer.global_step

    counts = Counts()
    fit(
        [Compiles(), clock, build_progress("text", stream=stream), counts],
        train_batches=epoch_steps,
    )
    told = [line for line in stream.getvalue().splitlines() if "an epoch (" in line]
    assert [line[10:] for line in told] == [text]
    assert counts.told_at == told_at_step


def test_an_accumulated_epoch_is_told_in_optimizer_steps(monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=2)
    shown = build_progress("json", stream=stream)
    fit([clock, shown], train_batches=12, accumulate_grad_batches=3, max_epochs=1)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    [pace] = [event for event in events if event["event"] == "pace"]
    assert (pace["epoch_steps"], pace["epoch_s"]) == (4, pytest.approx(24))


def test_text_lines_are_aligned_and_plain(tmp_path, monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=3)
    shown = build_progress("text", stream=stream)
    fit([clock, Throughput(6, 1), shown], [MetricsCSV(str(tmp_path))], train_batches=20)
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\[ +\d:\d\d\] ", line) for line in lines)
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    validations = [line for line in lines if " VAL " in line]
    assert len(validations) == 2
    assert len(lines) > 20
    numbers = [line for line in lines[:-1] if "an epoch (" not in line]
    assert len(numbers) == len(lines) - 2
    assert len({line.index("loss") for line in numbers}) == 1


def test_nothing_is_read_from_a_tensor_of_another_device(monkeypatch):
    stream = io.StringIO()

    class OnDevice(Callback):
        """A metric whose value is not on the host; reading it raises."""

        def on_train_batch_end(self, trainer, *args):
            trainer.callback_metrics["train/loss"] = torch.tensor(1.0, device="meta")

        def on_train_end(self, trainer, *args):
            del trainer.callback_metrics["train/loss"]  # the trainer moves all to the host then

    clock = Clock(monkeypatch, step_s=10)
    fit([clock, build_progress("json", stream=stream), OnDevice()], max_epochs=1, val_batches=0)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["train", "pace", *["train"] * 3, "end"]
    assert all("train/loss" not in event for event in events)


def test_log_lines_do_not_tear_the_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    terminal, clock = Terminal(), Clock(monkeypatch, step_s=3)

    class Speaker(Callback):
        def on_train_epoch_end(self, trainer, *args):
            logging.getLogger("lightship.any").info(f"note [{trainer.current_epoch}] of the epoch")

    with log.shown(Screen("auto", terminal), "info"):
        shown = build_progress("auto")
        assert isinstance(shown.display, Bar)
        fit([clock, Throughput(6, 1), Speaker(), shown], [MetricsCSV(str(tmp_path))])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    for epoch in (0, 1):
        assert [
            line for line in lines if re.fullmatch(rf"\[ .*\] note \[{epoch}\] of the epoch", line)
        ]
    assert [line for line in lines if "VAL" in line and "best loss" in line]
    assert "left" in text
    assert terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize("name", ["test", "validate"])
def test_an_evaluation_has_a_bar_of_its_own(monkeypatch, name):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    terminal, clock = Terminal(), Clock(monkeypatch, step_s=0)

    class Passing(Callback):
        def on_test_batch_start(self, *args):
            clock.now_s += 3

        on_validation_batch_start = on_test_batch_start

    shown = build_progress("auto", stream=terminal)
    evaluate(name, [Passing(), shown], batches=5)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    doing = {"test": "testing", "validate": "validating"}[name]
    assert re.search(rf"{doing} .* 2/5 batches  0:09 left", text)
    assert "epoch" not in text
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_batches_of_an_evaluation_are_lines_elsewhere(monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch, step_s=0)

    class Passing(Callback):
        def on_test_batch_start(self, *args):
            clock.now_s += 20

    evaluate("test", [Passing(), build_progress("text", stream=stream)], batches=3)
    lines = [line.rpartition("] ")[2] for line in stream.getvalue().splitlines()]
    assert lines[:3] == [
        "testing 1/3  left 0:40", "testing 2/3  left 0:20", "testing 3/3  left 0:00"
    ]  # fmt: skip


def test_an_exception_gives_the_screen_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()

    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit([build_progress("auto", stream=terminal), Fails()])
    assert terminal.getvalue().count("\x1b[?25h") == 1
