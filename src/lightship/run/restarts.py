"""The starts of a run and the cost of each restart: `logs/starts.json` under its output."""

import csv
import io
import json
import math
import time
from datetime import UTC, datetime
from typing import Any

from lightship import storage
from lightship.run.quarantine import set_aside

_MAX_STARTS_BYTES, _MAX_METRICS_BYTES = 2**24, 2**30


def record_start(output_url: str, step: int, processes: int) -> list[dict[str, Any]]:
    """Add this start to the earlier ones. Rank 0, before training; blocks.

    The progress of earlier starts is read from their metrics table, which may lack their last half
    minute: `steps_again` is a lower bound.

    Args:
        output_url: Of the run.
        step: Optimizer steps done in the checkpoint resumed from; 0 without one.
        processes: World size.

    Returns:
        All starts, oldest first, each with

        - `began`: ISO 8601, UTC,
        - `step`, `processes`: as given,
        - `trained_s`: seconds of training in the state at `step`,
        - `steps_again`: steps that an earlier start had done beyond `step`,
        - `lost_s`: seconds since the previous start began, less those whose training was kept: the
          work repeated, the pause, and the setup before the first step.
    """
    url = storage.join(output_url, "logs", "starts.json")
    starts = _kept_starts(url)
    rows = _metrics(storage.join(output_url, "logs", "metrics.csv"))
    reached = max((done for done, _ in rows), default=0)
    trained_s = max((spent_s for done, spent_s in rows if done <= step), default=0.0)
    now_s = time.time()
    lost_s = 0.0
    if starts:
        since_s = now_s - datetime.fromisoformat(starts[-1]["began"]).timestamp()
        lost_s = max(since_s - (trained_s - starts[-1]["trained_s"]), 0.0)
    starts.append(
        {
            "began": datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds"),
            "step": step,
            "processes": processes,
            "trained_s": round(trained_s, 3),
            "steps_again": max(reached - step, 0),
            "lost_s": round(lost_s, 3),
        }
    )
    storage.write_bytes(url, json.dumps(starts, indent=1).encode())
    return starts


def _kept_starts(url: str) -> list[dict[str, Any]]:
    """The recorded starts; none, with a warning, if the file is damaged."""
    if not storage.exists(url):
        return []
    data = storage.read_small(url, _MAX_STARTS_BYTES)
    try:
        starts = json.loads(data)
        for start in starts:
            datetime.fromisoformat(start["began"]).timestamp()
            for name in ("step", "processes", "trained_s", "steps_again", "lost_s"):
                if not math.isfinite(start[name]):
                    raise ValueError(f"{name} is {start[name]}")
        return [*starts[:]]  # raises for what is no list
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        set_aside(url, "is damaged")
        return []


def _metrics(url: str) -> list[tuple[int, float]]:
    """(step, seconds) of each row of a metrics table; none where there is no table."""
    if not storage.exists(url):
        return []
    data = storage.read_small(url, _MAX_METRICS_BYTES)
    try:
        table = csv.DictReader(io.StringIO(data.decode()))
        return [(int(float(row["step"])), float(row["time_s"])) for row in table]
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error):
        set_aside(url, "is not as lightship wrote it")
        return []
