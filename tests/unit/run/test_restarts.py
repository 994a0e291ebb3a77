"""What a run's restarts cost is read from what its starts have left."""

import json
import time
from pathlib import Path

from lightship.run.restarts import record_start


def leave_metrics(output: Path, *rows: tuple[int, float]) -> None:
    lines = [f"{step},0,{spent_s}" for step, spent_s in rows]
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "logs" / "metrics.csv").write_text("\n".join(["step,epoch,time_s", *lines]))


def test_a_first_start_has_lost_nothing(tmp_path: Path) -> None:
    [start] = record_start(str(tmp_path), 0, 4)
    assert (start["step"], start["processes"]) == (0, 4)
    assert (start["steps_again"], start["lost_s"], start["trained_s"]) == (0, 0, 0)


def test_a_restart_has_lost_what_was_not_kept(tmp_path: Path) -> None:
    record_start(str(tmp_path), 0, 2)
    kept = tmp_path / "logs" / "starts.json"
    [first] = json.loads(kept.read_text())
    # It began two minutes ago; 45 s of it are in the checkpoint of step 20, 25 steps were done.
    then_s = int(time.time()) - 120
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(then_s))
    kept.write_text(json.dumps([{**first, "began": began}]))
    leave_metrics(tmp_path, (10, 30.0), (20, 45.0), (25, 52.0))
    starts = record_start(str(tmp_path), 20, 1)
    assert [start["step"] for start in starts] == [0, 20]
    assert starts[1]["steps_again"] == 5
    assert starts[1]["trained_s"] == 45
    # What has passed, 120 s and this test's own time, less the 45 s that were kept.
    assert 120 - 45 <= starts[1]["lost_s"] <= time.time() - then_s - 45
    assert json.loads(kept.read_text()) == starts


def test_a_clock_that_was_set_back_loses_nothing(tmp_path: Path) -> None:
    record_start(str(tmp_path), 0, 1)
    leave_metrics(tmp_path, (8, 1e6))
    assert record_start(str(tmp_path), 8, 1)[1]["lost_s"] == 0
