"""Short fits on the device of these tests, in this process."""

import csv
import json
from pathlib import Path
from typing import Any

from lightship import cli
from tests.cuda.conftest import DEVICE

ACCELERATOR = f"--trainer.accelerator={'gpu' if DEVICE == 'cuda' else 'cpu'}"
FEW_STEPS = [
    "--config=digits", "--trainer.max_epochs=-1", "--trainer.max_steps=24",
    "--trainer.log_every_n_steps=8", "--data.eval_batch_size=100",
]  # fmt: skip


def command(name: str, output: Path, *flags: str) -> list[str]:
    """The command line, with devices and output."""
    return [
        name, f"--run.output={output}", "--run.tracking=none", "--run.log_images=0",
        "--trainer.devices=1", ACCELERATOR, *flags,
    ]  # fmt: skip


def fit(output: Path, *flags: str) -> list[float]:
    """A fit of a few steps; its training losses at the log points."""
    assert cli.main(command("fit", output, *FEW_STEPS, *flags)) == 0
    return losses(output)


def losses(output: Path) -> list[float]:
    with (output / "logs" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "DONE").read_text())
