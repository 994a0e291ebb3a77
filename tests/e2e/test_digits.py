"""The first thing anybody runs: `lightship fit` on the embedded digits, and what it leaves."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightship.models.classifier import ImageClassifier
from tests.support import warm
from tests.support.wandb_file import read_wandb_file

FRESH = (sys.executable, "-m", "lightship")


def lightship(
    *arguments: str, start: tuple[str, ...] | None = None
) -> subprocess.CompletedProcess[str]:
    """As a user starts it: with a thread a core, if it is a fresh interpreter."""
    command = [*(start or (warm.executable(),)), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `make train`'s command."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    done = lightship(
        "fit", "--config", "digits", "--run.output", str(output), "--run.tracking=offline",
        start=FRESH,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers, places = done.stderr.splitlines()[-2:]
    assert "done: test/" in numbers
    named = re.findall(rf"{re.escape(str(output))}[^\s,:]*", places)
    assert len(named) == 4, "the output, its report, its best checkpoint, its W&B run"
    for path in named:
        assert Path(path).exists(), path
    return output


def report(output: Path) -> dict:
    return json.loads((output / "report" / "report.json").read_text())


def test_digits_are_learned(trained: Path) -> None:
    numbers = json.loads((trained / "DONE").read_text())
    assert numbers["test/acc"] >= 0.97
    assert numbers["test/num_samples"] == 360


def test_a_checkpoint_is_left_that_stands_alone(trained: Path) -> None:
    commits = sorted((trained / "checkpoints").glob("*.commit.json"))
    assert commits
    newest = trained / "checkpoints" / json.loads(commits[-1].read_text())["file"]
    torch.load(newest, weights_only=True)
    model = ImageClassifier.load_from_checkpoint(newest, weights_only=True)
    assert model.class_names == [str(digit) for digit in range(10)]


def test_metrics_are_left_as_csv(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "logs" / "metrics.csv").open()))
    steps = [float(row["step"]) for row in rows]
    assert steps == sorted(steps)
    accuracies = [float(row["val/acc"]) for row in rows if row["val/acc"]]
    assert len(accuracies) == 15
    assert accuracies[-1] > accuracies[0]
    assert any(row["train/loss"] for row in rows)


def test_the_report_is_left(trained: Path) -> None:
    names = {path.name for path in (trained / "report").iterdir()}
    assert {"report.html", "report.json"} <= names
    assert report(trained)["test/acc"] == json.loads((trained / "DONE").read_text())["test/acc"]


def test_an_offline_run_is_left_with_metrics_images_and_settings(trained: Path) -> None:
    (run_path,) = (trained / "logs" / "wandb").glob("offline-run-*")
    run = read_wandb_file(next(run_path.glob("*.wandb")))
    assert sum("val/acc" in row for row in run.history) == 15
    assert any("train/loss" in row for row in run.history)
    assert run.config["data"]["root"] == "digits"
    assert run.history[-2]["test/acc"] == pytest.approx(report(trained)["test/acc"])
    assert run.exit_code == 0
    pictures = list((run_path / "files" / "media" / "images").rglob("*.png"))
    assert len(pictures) >= 32


def test_the_same_command_again_says_it_is_finished(trained: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    done = lightship("fit", "--config", "digits", "--run.output", str(trained))
    assert done.returncode == 0
    assert "run already complete" in done.stderr
    assert before == sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))


@pytest.mark.parametrize(
    ("command", "split", "count"), [("test", "test", 360), ("validate", "val", 144)]
)
def test_measuring_again_gives_the_same(
    trained: Path, command: str, split: str, count: int
) -> None:
    done = lightship(command, "--run.output", str(trained), start=FRESH)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((trained / "report" / f"{split}.json").read_text())
    assert numbers[f"{split}/num_samples"] == count
    if split == "test":
        assert numbers["test/acc"] == report(trained)["test/acc"]


def test_predict_writes_a_row_an_image(trained: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    done = lightship("predict", "--run.output", str(trained), "--predictions", str(table))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len({row["path"] for row in rows}) == 1797
    right = [row["class"] == Path(row["path"]).parent.name for row in rows]
    assert sum(right) / len(right) > 0.97
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)


def test_predictions_as_json_lines(trained: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    lightship("predict", "--run.output", str(trained), "--predictions", str(table))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == 1797
    best = {"class": rows[0]["class"], "probability": rows[0]["probability"]}
    assert rows[0]["top5"][0] == best
