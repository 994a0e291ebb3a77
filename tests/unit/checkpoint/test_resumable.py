"""Which numbers a resumed run may find in the metrics of a checkpoint."""

import math
from typing import Any

import pytest

from lightship.checkpoint.resumable import check_resumable
from lightship.errors import ConfigError


def checkpoint(**metrics: Any) -> dict[str, Any]:
    """The least that can be resumed from, with one row of metrics."""
    rows = [{"step": 1, "time_s": 0.5, **metrics}]
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
