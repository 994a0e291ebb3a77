"""Whether training can be resumed from a checkpoint that may come from anywhere."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightship.errors import ConfigError

_MAX_COUNT = 10**15


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Check the parts that hold counters and numbers, by which training would fail much later.

    Weights and optimizer states are checked against model and optimizer where they are loaded.

    Raises:
        ConfigError: A counter, a number or a row of the metrics is none.
    """
    for name in ("epoch", "global_step"):
        _refuse_unless(_is_count(checkpoint.get(name)), name)
    for name in ("optimizer_states", "lr_schedulers"):
        states = checkpoint.get(name) or [None]
        is_right = isinstance(states, list) and all(isinstance(each, Mapping) for each in states)
        _refuse_unless(is_right, name)
    for name in ("loops", "lr_schedulers", "callbacks"):
        for place, value in _leaves(checkpoint.get(name, {}), name):
            _refuse_unless(_is_plain(value), place)
    for place, value in _leaves(checkpoint["loops"], "loops"):
        _refuse_unless(_is_count(value), place)
    about = checkpoint["lightship"]
    _refuse_unless(isinstance(about, Mapping), "lightship")
    _refuse_unless(isinstance(about.get("should_stop"), bool), "lightship.should_stop")
    parts = about.get("accumulate_grad_batches", 1)  # which older versions did not store
    _refuse_unless(_is_count(parts) and parts > 0, "lightship.accumulate_grad_batches")
    rows = about.get("metrics")
    _refuse_unless(isinstance(rows, list), "lightship.metrics")
    for number, row in enumerate(rows or ()):
        place = f"lightship.metrics[{number}]"
        _refuse_unless(_is_row(row), place)


def _refuse_unless(is_right: bool, place: str) -> None:
    if not is_right:
        raise ConfigError(f"the checkpoint cannot be resumed from: {place} is not as it was saved")


def _is_count(value: Any) -> bool:
    return isinstance(value, bool) or (type(value) is int and 0 <= value < _MAX_COUNT)


def _is_row(row: Any) -> bool:
    """Whether it is a row of metrics as `MetricsCSV` has it."""
    if not isinstance(row, Mapping) or not row.keys() >= {"step", "time_s"}:
        return False
    for name, value in row.items():
        is_name = isinstance(name, str) and name.isprintable() and name[:1].isalnum()
        if not is_name or not _is_metric(value):
            return False
    # Of a user's own callback a row may lack its epoch, or have a fraction.
    is_in_range = all(0 <= row.get(name, 0) < _MAX_COUNT for name in ("step", "epoch"))
    return is_in_range and row["step"] == int(row["step"]) and math.isfinite(row["time_s"])


def _is_metric(value: Any) -> bool:
    """Whether it is a number; NaN and infinity are losses that were not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return True
    return type(value) in (int, float) and abs(value) <= 1e300


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, int | str | None):
        return False
    return value is None or isinstance(value, bool | str) or abs(value) < _MAX_COUNT


def _leaves(value: Any, place: str) -> list[tuple[str, Any]]:
    """(place, value) of all that lies within dictionaries, lists and tuples."""
    if isinstance(value, Mapping):
        parts = [(f"{place}.{key}", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{place}[{number}]", part) for number, part in enumerate(value)]
    else:
        return [(place, value)]
    return [leaf for name, part in parts for leaf in _leaves(part, name)]
