"""A loss that is not finite is seen at the next log point or validation, and said once."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightship.checkpoint.policy import CheckpointPolicy
from lightship.config import TrainerConfig
from lightship.distributed.signals import StopRequest
from lightship.errors import EXIT_CODES, Diverged
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.training.callbacks.checkpointing import Checkpointing
from lightship.training.callbacks.divergence import Divergence
from lightship.training.callbacks.early_stopping import EarlyStopping
from lightship.training.callbacks.throughput import Throughput
from tests.support.little_fit import classifier, fit


class Failing(nn.Module):
    """A net whose outputs are multiplied by `value` from a training step on, or in evaluation."""

    def __init__(self, net: nn.Module, value: float, from_step: float, in_evaluation: bool) -> None:
        super().__init__()
        self.net, self.value, self.steps = net, value, 0
        self.from_step, self.in_evaluation = from_step, in_evaluation

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        fails = self.steps >= self.from_step if self.training else self.in_evaluation
        return self.net(images) * (self.value if fails else 1.0)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "divergence" in record.name]


def fit_failing(
    tmp_path, action="warn", value=math.nan, from_step=7.0, in_evaluation=False, stopping=None
):
    """Four epochs of four steps, with a log point every third step and at each epoch's end."""
    model, table = classifier(), MetricsCSV(str(tmp_path))
    model.net = Failing(model.net, value, from_step, in_evaluation)
    divergence = Divergence(action, table, stopping)
    before = [] if stopping is None else [stopping]
    try:
        fit([*before, divergence, Throughput(6, 3, divergence)], [table], model=model, max_epochs=4)
    finally:
        table.finalize()
    return table


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_warn_says_once_since_when_and_goes_on(tmp_path, caplog, value: float) -> None:
    table = fit_failing(tmp_path, value=value)
    [line] = lines(caplog)
    # The seventh step is in the log point of the eighth; that before was of the sixth.
    assert "train/loss is not finite (nan) since step 8 (last finite at step 6)" in line
    assert "--trainer.on_nonfinite warn does not end the run" in line
    assert table.rows[-1]["step"] == 16


def test_early_stopping_ends_the_run_at_the_validation(tmp_path, caplog) -> None:
    stopping = EarlyStopping.of(TrainerConfig(early_stopping_patience=3))
    table = fit_failing(tmp_path, stopping=stopping)
    seen, ended = lines(caplog)
    assert "train/loss is not finite (nan) since step 8" in seen
    assert "early stopping ends the run if the next val/loss is not finite either" in seen
    assert "val/loss is not finite (nan) since step 8 (last finite at step 4)" in ended
    assert "; early stopping ends the run, and" in ended
    assert table.rows[-1]["step"] == 8


def test_early_stopping_by_accuracy_ends_no_run_for_its_loss(tmp_path, caplog) -> None:
    config = TrainerConfig(early_stopping_patience=9, monitor="val/acc")
    table = fit_failing(tmp_path, stopping=EarlyStopping.of(config))
    [line] = lines(caplog)
    assert "--trainer.on_nonfinite warn does not end the run" in line
    assert table.rows[-1]["step"] == 16


def test_stop_ends_the_run_at_that_log_point(tmp_path) -> None:
    with pytest.raises(
        Diverged, match=r"since step 8 .last finite at step 6.*checkpoints kept"
    ) as e:
        fit_failing(tmp_path, "stop")
    assert e.value.exit_code == EXIT_CODES["diverged"].code == 70


def test_a_validation_is_looked_at_too(tmp_path, caplog) -> None:
    fit_failing(tmp_path, from_step=math.inf, in_evaluation=True)
    [line] = lines(caplog)
    assert "val/loss is not finite (nan) since step 4 (never finite before)" in line


def test_a_finite_loss_says_nothing(tmp_path, caplog) -> None:
    fit_failing(tmp_path, "stop", from_step=math.inf)
    assert lines(caplog) == []


def test_no_counted_row_is_no_divergence(tmp_path) -> None:
    divergence = Divergence("stop", MetricsCSV(str(tmp_path)))
    divergence.look("train", {"train/loss": math.nan, "train/acc": math.nan}, 3)
    divergence.look("train", {}, 3)


def test_a_restart_knows_what_was_before_it(tmp_path, caplog) -> None:
    table = MetricsCSV(str(tmp_path))
    losses = [(10, 1.0), (20, 0.5), (30, math.nan), (40, math.nan)]
    table.load_rows([{"step": at, "train/loss": x, "time_s": 0.0} for at, x in losses])
    divergence = Divergence("warn", table)
    divergence.look("train", {"train/loss": math.nan, "train/acc": 0.5}, 50)
    assert "since step 30 (last finite at step 20)" in lines(caplog)[0]


@pytest.mark.parametrize(
    ("loss", "acc", "score"), [(0.5, 0.9, 0.9), (math.nan, 0.9, None), (math.inf, 0.9, None)]
)
def test_accuracy_scores_no_checkpoint_whose_loss_is_not_finite(tmp_path, loss, acc, score) -> None:
    table, bound = MetricsCSV(str(tmp_path)), CheckpointPolicy(None, None)
    saving = Checkpointing(None, {}, StopRequest(), table, "val/acc", bound)  # type: ignore[arg-type]
    metrics = {"val/loss": torch.tensor(loss), "val/acc": torch.tensor(acc, dtype=torch.float64)}
    saving.on_validation_end(SimpleNamespace(callback_metrics=metrics), None)  # type: ignore[arg-type]
    assert saving._score == score
