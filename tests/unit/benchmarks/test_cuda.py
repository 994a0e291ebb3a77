"""What `make bench-cuda` makes of the peer's output, of its rows and of its time."""

import time

from benchmarks import cuda
from benchmarks.cuda_part import LIMIT
from benchmarks.speed_airbench import outcome

ROW = "|  {}  |  {}  |  0.9500  |  0.9300  |  {}  |  {}  |\n"


def test_the_runs_that_the_peer_finished_count_without_its_warm_up() -> None:
    text = "|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |\n"
    for run, accuracy, seconds in (
        ("warmup", "0.1000", "9.0"),
        (0, "0.9400", "2.0"),
        (1, "0.9402", "2.2"),
    ):
        text += ROW.format(run, "7", "", seconds) + ROW.format("", "eval", accuracy, seconds)
    found = outcome(text + ROW.format(2, "0", "", "0.3"))  # ended in its third run
    assert found["accuracies"] == [0.94, 0.9402]
    assert found["seconds"] == [2.0, 2.2]
    assert round(found["test/acc"], 6) == 0.9401


def test_a_rate_stands_beside_the_limit_of_its_part_and_net() -> None:
    rows = [
        {"part": "finetune", "arm": "bare a", "of": "a", "images_per_s": [100.0], LIMIT: True},
        {"part": "finetune", "arm": "bare b", "of": "b", "images_per_s": [50.0], LIMIT: True},
        {"part": "finetune", "arm": "fit b", "of": "b", "images_per_s": [40.0]},
        {"part": "cifar10_96", "arm": "fit", "accuracy": [0.96]},
    ]
    shares = [cuda._cells(row, rows)[4] for row in rows]
    assert shares == ["", "", "0.800", ""]


def test_what_a_part_leaves_goes_to_the_next(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "PARTS", {"one": 30.0, "two": 10.0})
    shares = cuda._shares(["one", "two"], time.monotonic() + 400)
    assert [(part, round(budget_s, -1)) for (part,), budget_s in shares] == [
        ("one", 300),
        ("two", 400),
    ]
