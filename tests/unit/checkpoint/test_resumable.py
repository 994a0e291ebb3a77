"""Which numbers a resumed run may find in the metrics of a checkpoint."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from lightship.checkpoint.resumable import check_resumable
from lightship.errors import ConfigError
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.training.callbacks.progress import build_progress


def checkpoint(**metrics: Any) -> dict[str, Any]:
    """The least that can be resumed from, with one row of metrics."""
    rows = [{"step": 1, "time_s": 0.5} | metrics]
    return {
        "epoch": 0, "global_step": 1, "loops": {}, "optimizer_states": [{}], "lr_schedulers": [{}],
        "lightship": {"should_stop": False, "metrics": rows},
    }  # fmt: skip


@pytest.mark.parametrize("loss", [1, 0.5, math.nan, math.inf, -math.inf, -1e300])
def test_a_loss_need_not_be_finite(loss: float) -> None:
    check_resumable(checkpoint(**{"train/loss": loss}))


@pytest.mark.parametrize("loss", ["1", None, True, 10**400, 1e301, [1.0]])
def test_what_is_no_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match=r"lightship\.metrics\[0\] is not as it was saved"):
        check_resumable(checkpoint(**{"train/loss": loss}))


@pytest.mark.parametrize("count", [0, 7, 7.0])
def test_a_step_and_an_epoch_are_counts(count: float) -> None:
    check_resumable(checkpoint(step=count, epoch=count, **{"val/loss": 0.5}))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("step", "epoch") for value in
     (math.nan, math.inf, -1, 1.5e300, 10**15, True, "1", None)]
    + [("step", 0.5)] + [("time_s", value) for value in (math.nan, math.inf, "1", None)],
)  # fmt: skip
def test_a_row_whose_place_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"lightship\.metrics\[0\] is not as it was saved"):
        check_resumable(checkpoint(**{name: value}))


def test_what_is_accepted_can_be_continued() -> None:
    """Rows that a user's callback logged have no epoch."""
    rows = checkpoint(**{"val/loss": 0.5, "val/mine": 1.0})
    check_resumable(rows)
    table = MetricsCSV("memory://run")
    table.load_rows(rows["lightship"]["metrics"])
    trainer = SimpleNamespace(
        global_step=1, estimated_stepping_batches=9, loggers=[table], is_global_zero=False
    )
    build_progress("text").on_train_start(trainer, None)  # type: ignore[arg-type]
    table.log_metrics({"train/loss": 1.0}, 2)
    assert [row["step"] for row in table.rows] == [1, 2]
